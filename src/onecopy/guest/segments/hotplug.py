"""The host's side of loading a segment into a running guest: devices, lease, record.

A segment is ``loading`` from `plug` to `confirm`, then ``loaded``, and ``kept`` from `release` on:
QEMU cannot take its devices away, and they are used again when the same segment comes back. Not
here: the guest's side (attach.py; service.py for guests that do theirs by themselves).
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence

import msgspec

from onecopy.errors import AlreadyExists, GuestFailed, InvalidInput, NotFound
from onecopy.guest.backing import Backing, backings
from onecopy.guest.machine import Placed, attached, check_mountpoint, ranges_of
from onecopy.guest.run_directory import Attached, GuestRecord, RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.guest.segment_costs import require_room
from onecopy.guest.segments import reset
from onecopy.images.initramfs import TOOLS_MOUNTPOINT
from onecopy.linux.lock import locked_within
from onecopy.model import Reference
from onecopy.store import Artifact
from onecopy.vmm import pmem_hotplug
from onecopy.vmm.monitor import connect

#: Seconds that another command on the guest may take: it may store all of its memory.
_WAITING = 300.0


async def plug(
    host: Runtime, name: str, ref: Reference, mountpoint: str = "", *, exclusive: bool = False
) -> Attached:
    """Give the guest the devices of a segment; it is `loading` until `confirm` or `release`.

    Raises NotFound, Restricted, OtherDomain, AlreadyExists, InvalidInput, NoSlot, TooLarge,
    InsufficientResources, NotPermitted, StoreDamaged, GuestFailed.
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
        _note(folder, loading)
        return loading


async def confirm(host: Runtime, name: str, segment: str, mountpoint: str = "") -> Attached:
    """The guest has what was plugged in; raise NotFound."""
    return await _change(host, name, segment, state="loaded", mountpoint=mountpoint)


async def release(host: Runtime, name: str, segment: str) -> Attached:
    """The guest uses a segment no more; raise NotFound."""
    return await _change(host, name, segment, state="detached", mountpoint="")


def find(record: GuestRecord, segment: str) -> Attached:
    """A segment that the guest has loaded; raise NotFound."""
    for item in record.attached:
        if item.name == segment and item.state != "detached":
            return item
    names = sorted(item.name for item in record.attached if item.state != "detached")
    raise NotFound(f"{record.name} has not loaded {segment}", hint=f"it has {', '.join(names)}")


def require_detachable(record: GuestRecord, segment: str) -> Attached:
    """A loaded segment that the guest can do without; raise NotFound, InvalidInput."""
    item = find(record, segment)
    if item.mountpoint in ("/", TOOLS_MOUNTPOINT):
        raise InvalidInput(f"{record.name} runs from {segment}", hint="`onecopy stop` the guest")
    return item


def _kept(record: GuestRecord, artifact: Artifact, placed: Sequence[Placed]) -> Attached | None:
    """The devices that the guest already has for a segment; raise AlreadyExists."""
    found = None
    classes = [item.segment.page_class for item in placed]
    for item in record.attached:
        if item.name == artifact.name and item.state != "detached":
            raise AlreadyExists(
                f"{record.name} has loaded {item.ref} already",
                hint=f"`onecopy detach {record.name} {item.name}` it first",
            )
        same = [device.page_class for device in item.devices] == classes
        if item.digest == artifact.digest and same and item.state == "detached":
            found = item
    return found


def _require_memory(record: GuestRecord, placed: Sequence[Placed]) -> None:
    """Raise TooLarge; what the guest has already, also if it is unloaded, is described, too."""
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
            connect(folder.path / "monitor.sock") as monitor,
            backings(host, classes, lease, late=True) as found,
        ):
            numbers = pmem_hotplug.choose(
                await pmem_hotplug.used_slots(monitor), len(placed), record.name
            )
            # QEMU keeps it, and with it the lease, until it ends.
            await monitor.give_fd(lease.fd, f"lease.{secrets.token_hex(4)}")
            ranges: list[tuple[Placed, Backing, str]] = []
            for number, item in zip(numbers, placed, strict=True):
                backed = found.back(item.needed)
                await pmem_hotplug.plug(
                    monitor, number, backed.slot, pid=record.pid, listener=record.listener
                )
                ranges.append((item, backed, f"01:{number:02x}"))
        return attached(ranges, state="loading", exclusive=exclusive)


def words(item: Attached, mountpoint: str) -> list[str]:
    """What the script is told of a segment (images/files/segment)."""
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
        _note(folder, item)
        return item


def _note(folder: RunDirectory, item: Attached) -> None:
    """Write ``item`` in place of what the record had of the same devices."""
    record = folder.record()
    addresses = [device.address for device in item.devices]
    rest = [old for old in record.attached if [each.address for each in old.devices] != addresses]
    folder.write(msgspec.structs.replace(record, attached=(*rest, item)))


@contextlib.asynccontextmanager
async def changing(host: Runtime, name: str) -> AsyncIterator[RunDirectory]:
    """The guest's folder, while nobody else changes what it has loaded.

    Raises NotFound, and GuestFailed if somebody does so for too long.
    """
    folder = host.guest(name)
    late = GuestFailed(
        f"another command has changed what {name} has loaded for {_WAITING:g} s",
        hint="try again when it has ended",
    )
    async with locked_within(folder.path / "attach.lock", _WAITING, late):
        yield folder
