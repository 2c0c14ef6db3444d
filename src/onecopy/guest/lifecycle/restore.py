"""Load a saved state: into a new VMM, or let a VMM run that has loaded it already.

Not here: how that VMM starts (launcher.py), what makes a clone a machine of its own (identity.py).
"""

from __future__ import annotations

from msgspec.structs import replace

from onecopy.errors import GuestFailed, NotFound
from onecopy.guest.network import require_closed
from onecopy.guest.ports import Ports, forward, published
from onecopy.guest.run_directory import GuestRecord, RunDirectory
from onecopy.linux import process
from onecopy.vmm.monitor import Monitor, connect
from onecopy.vmm.qemu_process import Vmm


async def load(monitor: Monitor, devices: int, *, runs: bool) -> None:
    """Load the state of the devices from a descriptor; let the guest run on, unless it waits."""
    await monitor.incoming(devices)
    if runs:
        await monitor.execute("cont")


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
    async with connect(folder.path / "monitor.sock") as monitor:
        await forward(monitor, folder.path, publish)
        await monitor.execute("cont")
        ports = await published(monitor, folder.path, publish)
    return replace(record, name=folder.name, publish=ports)
