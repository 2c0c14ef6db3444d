"""Extra resources of a guest at its start: memory, processors, segments and disks.

A start fails if a resource is not available. Not here: giving them to the guest (hot_add.py), the
files of disks (disks.py).
"""

from __future__ import annotations

import msgspec

from onecopy.errors import AlreadyExists, InvalidInput, TooLarge
from onecopy.guest.lifecycle.disks import DiskSpec
from onecopy.guest.machine import MappedSegment, SystemConfig, check_mountpoint, ranges_of
from onecopy.guest.runtime import Runtime
from onecopy.guest.segment_costs import require_room
from onecopy.model import MIB, Reference, format_size
from onecopy.vmm import pmem_hotplug
from onecopy.vmm.argv import HOT_ROOM, cpu_room
from onecopy.vmm.ram_cpu_hotplug import MEMORY_BLOCK

#: The most new memory, as a multiple of the saved RAM. Linux describes each new page (4 KiB) with
#: 64 bytes of its old memory; this takes at most a quarter of the old memory.
_TIMES = 16


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
