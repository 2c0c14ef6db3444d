"""Extra resources of a guest at its start: memory, processors, segments and disks.

QEMU hot-plugs them when the guest runs, before the guest is handed out. The start fails if a
resource is not available, or if the guest does not confirm it (images/files/fit). Not here: the
devices (vmm/ram_cpu_hotplug.py, vmm/disk_hotplug.py), the files of disks (disks.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from onecopy.errors import AlreadyExists, GuestFailed, InvalidInput, TooLarge
from onecopy.guest import guest_script
from onecopy.guest.lifecycle.disks import DiskSpec, OpenDisk, opened
from onecopy.guest.machine import MappedSegment, SystemConfig, check_mountpoint, ranges_of
from onecopy.guest.run_directory import Batch, GuestDisk, GuestRecord, RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.guest.segment_costs import require_room
from onecopy.guest.segments.attach import attach
from onecopy.linux import disk_image
from onecopy.model import MIB, Reference, format_size
from onecopy.vmm import disk_hotplug, logs, pmem_hotplug, ram_cpu_hotplug, vmm_limits
from onecopy.vmm.argv import HOT_ROOM, cpu_room
from onecopy.vmm.monitor import Monitor, connect
from onecopy.vmm.ram_cpu_hotplug import MEMORY_BLOCK

#: Seconds for the guest to use its resources, and the least bytes of memory a second besides: a
#: saved kernel clears new memory, slowly under TCG.
_PATIENCE, _PACE = 60.0, 16 * MIB
#: The most new memory, as a multiple of the saved RAM. Linux describes each new page (4 KiB) with
#: 64 bytes of its old memory; this takes at most a quarter of the old memory.
_TIMES = 16
#: Id of an error of the guest's script -> the hint.
_HINTS = {
    "no-cpu": "save the system again with more --cpus",
    "no-memory": "save the system again with more --memory",
    "no-mount": "a disk is mounted if it has an ext4 (mkfs.ext4); else leave :/MOUNTPOINT out",
    "mount-point-in-use": "choose another mount point",
}


class ExtraResources(msgspec.Struct, frozen=True):
    """Resources beyond those of the saved system or of the boot."""

    memory: int | None = None
    """Bytes of RAM in all; None: as saved."""
    cpus: int | None = None
    """Processors in all; None: as saved."""
    segments: tuple[tuple[Reference, str], ...] = ()
    """Pairs (segment, mount point); "" leaves a segment unmounted."""
    disks: tuple[DiskSpec, ...] = ()


NOTHING = ExtraResources()


def require_possible(
    host: Runtime, wanted: ExtraResources, config: SystemConfig, so_far: str
) -> None:
    """Check before a start that a machine can get these resources.

    Args:
        config: The machine.
        so_far: The beginning of messages, such as "it boots".

    Raises:
        NotFound, AlreadyExists: A segment does not exist, or the machine has it already.
        InvalidInput, TooLarge: The machine cannot get a resource.
    """
    if wanted == NOTHING:
        return
    if not config.agent:
        raise InvalidInput(
            f"{so_far} as a bare machine, which cannot confirm that it uses added resources",
            hint="omit --memory, --cpus, --segment and --disk",
        )
    if wanted.memory is not None:
        _require_memory(wanted.memory, config.memory, so_far)
    if wanted.cpus is not None:
        _require_cpus(wanted.cpus, config, so_far)
    further = _further(host, wanted, config, so_far)
    if further:
        sizes = [item.size for item in (*config.segments, *further)]
        require_room(sizes, wanted.memory or config.memory)
    # No slot is in use at the start.
    pmem_hotplug.choose(set(), len(further) + len(wanted.disks), "a guest")
    for spec in wanted.disks:
        _check_mountpoint(spec.mountpoint)
    mountpoints = [each for _, each in wanted.segments] + [each.mountpoint for each in wanted.disks]
    for each in filter(None, mountpoints):
        if mountpoints.count(each) > 1:
            raise InvalidInput(
                f"the mount point {each} is given twice", hint="give each mount point only once"
            )


def _further(
    host: Runtime, wanted: ExtraResources, config: SystemConfig, so_far: str
) -> list[MappedSegment]:
    """Return the ranges of further segments; raise what `attach` raises before it acts."""
    there = {item.ref.partition(":")[0] for item in config.segments}
    found = []
    for ref, mountpoint in wanted.segments:
        segment = host.store.resolve(ref, "segment")
        if segment.name in there:
            raise AlreadyExists(f"{so_far} with {segment.name} loaded", hint="omit it")
        there.add(segment.name)
        _check_mountpoint(mountpoint)
        found += [placed.segment for placed in ranges_of(segment, mountpoint)]
    return found


def _check_mountpoint(mountpoint: str) -> None:
    if mountpoint:
        check_mountpoint(mountpoint)


def _require_memory(wanted: int, saved: int, so_far: str) -> None:
    more = wanted - saved
    if more < 0:
        raise InvalidInput(
            f"{so_far} with {format_size(saved)} of RAM, and cannot have less",
            hint="save it again with less --memory",
        )
    if more % MEMORY_BLOCK:
        best = saved + more // MEMORY_BLOCK * MEMORY_BLOCK
        raise InvalidInput(
            f"{so_far} with {format_size(saved)} of RAM; it can grow only in steps of "
            f"{MEMORY_BLOCK // MIB} MiB",
            hint=f"give --memory {best // MIB}M or {(best + MEMORY_BLOCK) // MIB}M",
        )
    most = min(saved * _TIMES, HOT_ROOM // 2)
    if more > most:
        raise TooLarge(
            f"{so_far} with {format_size(saved)} of RAM, and can get at most {format_size(most)} "
            "more",
            hint="save it again with more --memory",
        )


def _require_cpus(wanted: int, config: SystemConfig, so_far: str) -> None:
    saved = config.cpus
    if wanted < saved:
        raise InvalidInput(
            f"{so_far} with --cpus {saved}, and cannot have fewer",
            hint="save it again with fewer --cpus",
        )
    room = min(cpu_room(saved), config.cpu_room or saved)
    if wanted > room:
        why = "" if config.accel == "kvm" else f": under {config.accel} Linux cannot add vCPUs"
        raise TooLarge(
            f"{so_far} with --cpus {saved}, and can have at most {room}{why}",
            hint="save it again with more --cpus",
        )


async def fit(
    host: Runtime, batch: Batch, folder: RunDirectory, record: GuestRecord, wanted: ExtraResources
) -> GuestRecord:
    """Give a starting guest its extra resources; return its new record.

    After an error the caller must end the VMM.

    Raises:
        NoSlot: The guest has no slot for another device.
        GuestFailed, AgentFailed: The guest could not use a resource.
        OnecopyError: Any error of `disks.opened` and `attach`.
    """
    if wanted == NOTHING:
        return record
    with contextlib.ExitStack() as files:
        disks = [files.enter_context(opened(host, record.name, each)) for each in wanted.disks]
        words: list[str] = []
        async with connect(folder.path) as monitor:
            words += await _grow(monitor, record, wanted)
            if disks:
                with host.locked():
                    _let_write(folder.path, record.pid, disks)
            plugged = await _plug(monitor, record.name, disks)
        for each in plugged:
            words += ["disk", each.name, each.address, each.mountpoint or "-"]
        if words:
            more = (wanted.memory or record.memory) - record.memory
            await _confirm(folder, words, timeout=_PATIENCE + more / _PACE)
        memory, cpus = wanted.memory or record.memory, wanted.cpus or record.cpus
        record = msgspec.structs.replace(
            record, memory=memory, added=memory - record.memory, cpus=cpus, disks=plugged
        )
        if not wanted.segments:
            return record
        # `attach` reads the guest's record and changes it.
        folder.write(record)
        for ref, mountpoint in wanted.segments:
            await attach(host.seeing(batch), record.name, ref, mountpoint)
        return folder.record()


async def _grow(monitor: Monitor, record: GuestRecord, wanted: ExtraResources) -> list[str]:
    """Plug in memory and processors; return the words about them for the guest's script."""
    words: list[str] = []
    more = (wanted.memory or record.memory) - record.memory
    if more:
        vmm_limits.let_map(record.pid, more, private=True)
        address = await ram_cpu_hotplug.add_memory(monitor, more)
        words += ["memory", str(address), str(more)]
    if wanted.cpus and wanted.cpus > record.cpus:
        await ram_cpu_hotplug.add_cpus(monitor, wanted.cpus - record.cpus)
        words += ["cpus", str(wanted.cpus)]
    return words


async def _plug(monitor: Monitor, guest: str, disks: Sequence[OpenDisk]) -> tuple[GuestDisk, ...]:
    slots = pmem_hotplug.choose(await pmem_hotplug.used_slots(monitor), len(disks), guest)
    plugged = []
    for number, (slot, item) in enumerate(zip(slots, disks, strict=True)):
        name = f"disk{number}"
        await disk_hotplug.plug(monitor, slot, item.fd, item.form, name)
        plugged.append(
            GuestDisk(
                name=name,
                path=str(item.path),
                format=item.form,
                owned=item.spec.file is None,
                mountpoint=item.spec.mountpoint,
                address=f"01:{slot:02x}",
                created=item.made,
            )
        )
    return tuple(plugged)


def _let_write(folder: Path, pid: int, disks: Sequence[OpenDisk]) -> None:
    """Raise QEMU's limit on file sizes to the largest disk; the caller holds the host's lock."""
    logs.make_room(folder, pid, max(disk_image.largest_size(each.fd, each.form) for each in disks))


async def _confirm(folder: RunDirectory, words: Sequence[str], *, timeout: float) -> None:
    done = await guest_script.fit(folder.path, *words, timeout=timeout)
    if done.exit_code:
        reason = done.stderr.decode(errors="replace").partition(":")[0]
        raise GuestFailed(
            f"{folder.name} cannot use the added resources: {guest_script.said(done)}",
            hint=_HINTS.get(reason, ""),
        )
