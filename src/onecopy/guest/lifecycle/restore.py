"""Wakes a VMM from a pool, which has loaded a saved state but has no guest's name (pool.py).

Not here: loading the state (launcher.py), a clone's identity (guest/identity.py).
"""

from __future__ import annotations

from msgspec.structs import replace

from onecopy.errors import GuestFailed, NotFound
from onecopy.guest.network import require_closed
from onecopy.guest.ports import Ports, forward, published
from onecopy.guest.run_directory import GuestRecord, RunDirectory
from onecopy.linux import process
from onecopy.vmm.qemu_process import Vmm


def vmm_of(folder: RunDirectory, record: GuestRecord) -> Vmm:
    """Return the VMM of a ready guest; raise GuestFailed if it has ended."""
    try:
        argv = process.cmdline(record.pid)
        return Vmm(record.pid, folder.path, argv, listener=record.listener)
    except (NotFound, ProcessLookupError) as error:
        raise GuestFailed("the ready guest ended before it was used", hint="try again") from error


async def wake(folder: RunDirectory, record: GuestRecord, publish: Ports) -> GuestRecord:
    """Resume a ready guest, whose run directory already has the guest's name.

    Args:
        folder: The guest's run directory.
        record: The record from the pool.
        publish: The ports to publish.

    Returns:
        The guest's record.

    Raises:
        Incompatible: The guest's network cannot be closed to the host.
        InUse: A port is taken.
    """
    from onecopy.vmm.monitor import connect  # launcher.py says why it loads late

    require_closed(record, folder.path)
    async with connect(folder.path) as monitor:
        await forward(monitor, folder.path, publish)
        await monitor.execute("cont")
        ports = await published(monitor, folder.path, publish)
    return replace(record, name=folder.name, publish=ports)
