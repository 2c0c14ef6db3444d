"""Loads segments into a running guest, and unloads them.

Loading plugs memory devices into the machine (hotplug.py). Then the guest links and mounts them
(images/files/segment). Unloading unmounts them. The devices and the guest's lease stay.
"""

from __future__ import annotations

from onecopy.errors import GuestFailed, NotUnmounted
from onecopy.guest import guest_script
from onecopy.guest.run_directory import Attached
from onecopy.guest.runtime import Runtime
from onecopy.guest.segments.hotplug import confirm, plug, release, require_detachable, words
from onecopy.model import Reference
from onecopy.vmm.guest_reply import shown

#: Seconds for the guest to mount or unmount.
_PATIENCE = 60.0
#: The most processes that an error lists.
_MAX_HOLDERS = 20
#: Exit code of the script's `unplugged` when a process holds the segment.
_BUSY = 16


async def attach(
    host: Runtime, name: str, ref: Reference, mountpoint: str = "", *, exclusive: bool = False
) -> Attached:
    """Load a segment into a running guest.

    A failure leaves at most devices in the guest, in state ``kept``.

    Args:
        host: The runtime of the guest.
        name: The guest.
        ref: The segment.
        mountpoint: Where to mount it; "" to leave it as a device.
        exclusive: Whether the guest gets its own writable copy of a shared segment.

    Returns:
        The loaded segment.

    Raises:
        NotFound, Restricted, OtherDomain, AlreadyExists: The guest cannot have the segment.
        InvalidInput, NoSlot, TooLarge, InsufficientResources: The segment does not fit the guest.
        GuestFailed, AgentFailed: QEMU or the guest failed.
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
            hint=f"look at the kernel log: `onecopy exec {name} -- dmesg`",
        )
    return await confirm(host, name, loading.name, mountpoint)


async def detach(host: Runtime, name: str, segment: str) -> Attached:
    """Unload a segment: unmount it and remove its links. Its devices and the lease stay.

    Returns:
        The segment, in state ``kept``.

    Raises:
        NotFound: The guest has not loaded it.
        InvalidInput: The guest runs from it.
        NotUnmounted: Processes in the guest hold it; the error lists them.
        GuestFailed, AgentFailed: QEMU or the guest failed.
    """
    folder = host.guest_with_agent(name)
    require_detachable(folder.record(), segment)
    done = await guest_script.segment(folder.path, "unplugged", segment, timeout=_PATIENCE)
    if done.exit_code == _BUSY:
        holders = [shown(line) for line in done.stdout.splitlines()[:_MAX_HOLDERS]]
        raise NotUnmounted(
            f"{segment} is in use in {name} by {', '.join(holders) or 'a process'}",
            holders=holders,
            hint=f"end these processes: `onecopy exec {name} -- kill PID`",
        )
    if done.exit_code:
        raise GuestFailed(f"{name} could not unload {segment}: {guest_script.said(done)}")
    return await release(host, name, segment)
