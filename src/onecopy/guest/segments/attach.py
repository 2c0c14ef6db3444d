"""Segments of a running guest: load them, and unload them.

Loading plugs memory devices into the machine (hotplug.py) and has the guest find, name and mount
them (images/files/segment). Unloading unmounts; the devices, and the guest's lease, stay.
"""

from __future__ import annotations

from onecopy.errors import GuestFailed, NotUnmounted
from onecopy.guest import guest_script
from onecopy.guest.run_directory import Attached
from onecopy.guest.runtime import Runtime
from onecopy.guest.segments.hotplug import confirm, plug, release, require_detachable, words
from onecopy.model import Reference
from onecopy.vmm.guest_reply import shown

#: Seconds that the guest may take to find, mount or unmount.
_PATIENCE = 60.0
#: Processes that hold a segment, of which no more are told.
_TOLD = 20
#: Exit code of the script's `unplugged` when a process holds the segment.
_BUSY = 16


async def attach(
    host: Runtime, name: str, ref: Reference, mountpoint: str = "", *, exclusive: bool = False
) -> Attached:
    """Load a segment into a running guest, mounted on ``mountpoint`` or as a device (``""``).

    With ``exclusive`` the guest gets a private copy, to write to, of what others only read. Raises
    NotFound, Restricted, OtherDomain, AlreadyExists, InvalidInput, NoSlot, TooLarge,
    InsufficientResources, GuestFailed, AgentFailed. What fails leaves at most a device in the
    guest, marked as kept.
    """
    loading = await plug(host, name, ref, mountpoint, exclusive=exclusive)
    folder = host.guest(name)
    done = await guest_script.segment(
        folder.path, "plugged", *words(loading, mountpoint), timeout=_PATIENCE
    )
    if done.exit_code:
        await guest_script.segment(folder.path, "unplugged", loading.name, timeout=_PATIENCE)
        await release(host, name, loading.name)
        raise GuestFailed(
            f"{name} could not load {ref}: {guest_script.said(done)}",
            hint=f"`onecopy exec {name} -- dmesg` may tell more",
        )
    return await confirm(host, name, loading.name, mountpoint)


async def detach(host: Runtime, name: str, segment: str) -> Attached:
    """Unload a segment: unmount it and take its name away. Its device, and the lease, stay.

    Raises NotFound, InvalidInput, NotUnmounted (with the processes that hold it), AgentFailed.
    """
    folder = host.guest_with_agent(name)
    require_detachable(folder.record(), segment)
    done = await guest_script.segment(folder.path, "unplugged", segment, timeout=_PATIENCE)
    if done.exit_code == _BUSY:
        holders = [shown(line) for line in done.stdout.splitlines()[:_TOLD]]
        raise NotUnmounted(
            f"{segment} is in use in {name} by {', '.join(holders) or 'a process'}",
            holders=holders,
            hint=f"end these processes: `onecopy exec {name} -- kill PID`",
        )
    if done.exit_code:
        raise GuestFailed(f"{name} could not unload {segment}: {guest_script.said(done)}")
    return await release(host, name, segment)
