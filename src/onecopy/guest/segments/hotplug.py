"""The host's part of loading a segment into a running guest: devices, lease and record.

A segment is ``loading`` from `plug` to `confirm`, then ``loaded``, and ``kept`` after `release`.
QEMU cannot remove the devices. They are used again when the same segment is loaded again. Not here:
the guest's part (attach.py, or service.py for requests of a guest).
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence

import msgspec

from onecopy.errors import AlreadyExists, GuestFailed, InvalidInput, NotFound
from onecopy.guest.backing import attached, backings
from onecopy.guest.machine import Placed, check_mountpoint, ranges_of
from onecopy.guest.run_directory import Attached, GuestRecord, RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.guest.segment_costs import require_room
from onecopy.guest.segments import reset
from onecopy.images.initramfs import TOOLS_MOUNTPOINT
from onecopy.linux.lock import locked_within
from onecopy.model import Reference
from onecopy.store import Artifact
from onecopy.vmm import pmem_hotplug
from onecopy.vmm.argv import Backing
from onecopy.vmm.monitor import connect

#: Seconds to wait for another command on the guest, which may be storing its memory.
_WAITING = 300.0


async def plug(
    host: Runtime, name: str, ref: Reference, mountpoint: str = "", *, exclusive: bool = False
) -> Attached:
    """Plug the devices of a segment into a guest; the segment is then ``loading``.

    Args:
        host: The runtime of the guest.
        name: The guest.
        ref: The segment.
        mountpoint: Where the guest will mount it; "" for a device.
        exclusive: Whether the guest gets its own writable copy of a shared segment.

    Raises:
        NotFound, Restricted, OtherDomain, AlreadyExists: The guest cannot have the segment.
        InvalidInput, NoSlot, TooLarge, InsufficientResources: The segment does not fit the guest.
        NotPermitted, StoreDamaged, GuestFailed: The host cannot map it.
    """
    if mountpoint:
        check_mountpoint(mountpoint)
    async with changing(host, name) as folder:
        record = folder.require_agent()
        artifact = host.store.resolve(ref, "segment")
        host.store.require_access([artifact.name], name, record.domain)
        placed = ranges_of(artifact, mountpoint, exclusive=exclusive)
        kept = _kept(record, artifact, placed)
        if kept:
            await reset.renew(host, record, kept, placed)
            loading = msgspec.structs.replace(
                kept,
                name=artifact.name,
                ref=artifact.ref,
                mountpoint=mountpoint,
                state="loading",
                exclusive=exclusive,
            )
        else:
            _require_memory(record, placed)
            loading = await _plug(host, folder, record, artifact, placed, exclusive=exclusive)
        _record(folder, loading)
        return loading


async def confirm(host: Runtime, name: str, segment: str, mountpoint: str = "") -> Attached:
    """Record that the guest has loaded a segment; raise NotFound."""
    return await _change(host, name, segment, state="loaded", mountpoint=mountpoint)


async def release(host: Runtime, name: str, segment: str) -> Attached:
    """Record that the guest no longer uses a segment; raise NotFound."""
    return await _change(host, name, segment, state="detached", mountpoint="")


def find(record: GuestRecord, segment: str) -> Attached:
    """Return a segment that the guest has loaded; raise NotFound."""
    for item in record.attached:
        if item.name == segment and item.state != "detached":
            return item
    names = sorted(item.name for item in record.attached if item.state != "detached")
    raise NotFound(
        f"{record.name} has not loaded {segment}", hint=f"it has loaded {', '.join(names)}"
    )


def require_detachable(record: GuestRecord, segment: str) -> Attached:
    """Return a loaded segment that can be unloaded.

    Raises:
        NotFound: The guest has not loaded it.
        InvalidInput: The guest runs from it.
    """
    item = find(record, segment)
    if item.mountpoint in ("/", TOOLS_MOUNTPOINT):
        raise InvalidInput(
            f"{record.name} runs from {segment}, which cannot be unloaded",
            hint="stop the guest with `onecopy stop`",
        )
    return item


def _kept(record: GuestRecord, artifact: Artifact, placed: Sequence[Placed]) -> Attached | None:
    """Return the kept devices that fit a segment, if any; raise AlreadyExists if it is loaded."""
    found = None
    classes = [item.segment.page_class for item in placed]
    for item in record.attached:
        if item.name == artifact.name and item.state != "detached":
            raise AlreadyExists(
                f"{record.name} has loaded {item.ref} already",
                hint=f"detach it first: `onecopy detach {record.name} {item.name}`",
            )
        same = [device.page_class for device in item.devices] == classes
        if item.digest == artifact.digest and same and item.state == "detached":
            found = item
    return found


def _require_memory(record: GuestRecord, placed: Sequence[Placed]) -> None:
    """Raise TooLarge unless the guest has RAM for these and all its present devices."""
    there = [device.size for item in record.attached for device in item.devices]
    require_room([*there, *(item.segment.size for item in placed)], record.memory)


async def _plug(
    host: Runtime,
    folder: RunDirectory,
    record: GuestRecord,
    artifact: Artifact,
    placed: Sequence[Placed],
    *,
    exclusive: bool,
) -> Attached:
    classes = [item.segment.page_class for item in placed]
    with host.store.extend(record.name, [artifact.digest]) as lease:
        async with (
            connect(folder.path) as monitor,
            backings(host, classes, lease, late=True) as found,
        ):
            numbers = pmem_hotplug.choose(
                await pmem_hotplug.used_slots(monitor), len(placed), record.name
            )
            # QEMU keeps this descriptor, and with it the lease, until it ends.
            await monitor.give_fd(lease.fd, f"lease.{secrets.token_hex(4)}")
            ranges: list[tuple[Placed, Backing, str]] = []
            for number, item in zip(numbers, placed, strict=True):
                backed = found.back(item)
                await pmem_hotplug.plug(
                    monitor, number, backed, pid=record.pid, listener=record.listener
                )
                ranges.append((item, backed, f"01:{number:02x}"))
        return attached(ranges, state="loading", exclusive=exclusive)


def words(item: Attached, mountpoint: str) -> list[str]:
    """Return the arguments of the script in the guest (images/files/segment)."""
    devices = [
        f"{device.address}:{'rw' if device.page_class.writable else 'ro'}"
        for device in item.devices
    ]
    return [item.name, item.devices[0].fs or "-", mountpoint or "-", *devices]


async def _change(
    host: Runtime, name: str, segment: str, *, state: str, mountpoint: str
) -> Attached:
    async with changing(host, name) as folder:
        item = find(folder.record(), segment)
        item = msgspec.structs.replace(item, state=state, mountpoint=mountpoint)
        _record(folder, item)
        return item


def _record(folder: RunDirectory, item: Attached) -> None:
    """Write ``item`` into the guest's record, in place of the entry with the same devices."""
    record = folder.record()
    addresses = [device.address for device in item.devices]
    rest = [old for old in record.attached if [each.address for each in old.devices] != addresses]
    folder.write(msgspec.structs.replace(record, attached=(*rest, item)))


@contextlib.asynccontextmanager
async def changing(host: Runtime, name: str) -> AsyncIterator[RunDirectory]:
    """Hold the lock on a guest's segments; yield its run directory.

    Raises:
        NotFound: There is no such guest.
        GuestFailed: Another command has held the lock for too long.
    """
    folder = host.guest(name)
    late = GuestFailed(
        f"another command has been changing the segments of {name} for {_WAITING:g} s",
        hint="try again when that command has ended",
    )
    async with locked_within(folder.path / "attach.lock", _WAITING, late):
        yield folder
