"""Wake a VMM that has loaded a saved state before it was known who it would be (pool.py).

Not here: how it loaded that (launcher.py), what makes a clone a machine of its own (identity.py).
"""

from __future__ import annotations

from msgspec.structs import replace

from onecopy.errors import GuestFailed, NotFound
from onecopy.guest.network import require_closed
from onecopy.guest.ports import Ports, forward, published
from onecopy.guest.run_directory import GuestRecord, RunDirectory
from onecopy.linux import process
from onecopy.vmm.monitor import connect
from onecopy.vmm.qemu_process import Vmm


def vmm_of(folder: RunDirectory, record: GuestRecord) -> Vmm:
    """The VMM of a guest that was prepared; raise GuestFailed if it has ended."""
    try:
        argv = process.cmdline(record.pid)
        return Vmm(record.pid, folder.path, argv, listener=record.listener)
    except (NotFound, ProcessLookupError) as error:
        raise GuestFailed("QEMU ended while it waited", hint="try again") from error


async def wake(folder: RunDirectory, record: GuestRecord, publish: Ports) -> GuestRecord:
    """Let a guest run that was prepared, now in the run folder of its own name.

    Raises Incompatible if it cannot be kept from this host, InUse.
    """
    require_closed(record, folder.path)
    async with connect(folder.path) as monitor:
        await forward(monitor, folder.path, publish)
        await monitor.execute("cont")
        ports = await published(monitor, folder.path, publish)
    return replace(record, name=folder.name, publish=ports)
