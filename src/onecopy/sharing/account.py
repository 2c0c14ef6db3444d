"""One guest's account: the memory that it has for itself, and the memory that it shares.

Not here: many guests together (``report``), and reading smaps (``onecopy.linux.counters.smaps``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Mapping as MappingOf
from itertools import groupby
from pathlib import Path

import msgspec

from onecopy.errors import NotPermitted, Unreadable
from onecopy.linux import files, process
from onecopy.linux.counters import ksm, smaps
from onecopy.linux.counters.smaps import Mapping
from onecopy.linux.files import Identity
from onecopy.model import PAGE_SIZE

#: Limits on the size of a memory map in bytes. For external processes it is 60 times what a QEMU
#: has; for onecopy's own it is the most that the kernel allows.
_LARGEST_EXTERNAL, _LARGEST = 16 << 20, 128 << 20
_DELETED = " (deleted)"
_NO_RAM = "the guest's RAM was not found in the memory map of QEMU"
#: The prefix of files that QEMU creates in a given directory (system/physmem.c, file_ram_open).
_QEMU_FILE = "/qemu_back_mem."


class GuestMaps(msgspec.Struct, frozen=True):
    """What is needed to account for a guest; paths are real paths."""

    name: str
    #: The VMM's process id.
    pid: int
    #: The file that backs the guest's RAM, such as a saved system's, or the directory in which QEMU
    #: creates one (hugetlbfs); None if QEMU was not given a file.
    ram_path: str | None
    ram_bytes: int
    #: Path of a segment's blob -> the segment's name.
    segments: MappingOf[str, str] = msgspec.field(default_factory=dict)
    #: Path that the VMM maps -> path of the same file in the store, where they differ.
    files: MappingOf[str, str] = msgspec.field(default_factory=dict)
    #: The part of ``ram_bytes`` that was hot-plugged; it is anonymous, whatever backs the rest.
    ram_added: int = 0
    #: Whether KSM may merge its RAM. It may not in a trust domain, because KSM ignores domains.
    mergeable: bool = True
    #: The VMM's start time: with ``pid``, its identity. None accepts any process with this pid.
    start_ticks: int | None = None
    #: Why the RAM cannot be identified; empty if it can.
    note: str = ""
    #: For an external QEMU: the paths that may be opened, and the files that they must be. None
    #: allows all.
    regular: MappingOf[str, Identity] | None = None
    #: Whether it is a fork server, which has no guest and so no RAM.
    serves: bool = False

    def file(self, path: str) -> str:
        """Return the path under which a segment's file is known for all guests."""
        return self.files.get(path, path)


class SegmentUse(msgspec.Struct, frozen=True):
    """One guest's use of one segment; figures in bytes, None is unknown."""

    name: str
    path: str
    #: Size of the mappings; 0 if the guest does not map it now.
    mapped: int
    #: In memory and in this process's page tables (Rss).
    resident: int
    #: The guest's own copies of its pages, in memory or swap.
    private: int
    #: The resident pages, each divided by the number of processes that map it (Pss).
    proportional: int | None
    #: The part in huge pages.
    huge: int


class GuestAccount(msgspec.Struct, frozen=True):
    """One guest's memory in bytes, described by ``report.COLUMNS``; None is unknown."""

    name: str
    pid: int
    ram_path: str | None
    ram_size: int
    ram_private: int | None
    ram_shared: int | None
    ram_proportional: int | None
    segments_mapped: int | None
    segments: tuple[SegmentUse, ...] | None
    segments_private: int | None
    vmm_private: int | None
    vmm_shared: int | None
    pss_total: int | None
    page_tables: int | None
    swapped: int | None
    huge: int | None
    ksm: int | None
    #: Why figures are missing; empty if none are.
    note: str = ""


def account(
    maps: GuestMaps,
    mappings: Sequence[Mapping],
    *,
    page_tables: int | None = None,
    ksm_bytes: int | None = None,
) -> GuestAccount:
    """Make the account of one VMM; if its RAM is not found, the figures that need it are None.

    Args:
        mappings: the VMM's mappings in address order.
        page_tables: the process's page tables in bytes.
        ksm_bytes: the process's merged bytes, used if the mappings do not say.
    """
    ram = find_ram(maps, mappings)
    known = bool(ram) or maps.serves
    ram_ids = {id(m) for m in ram}
    rest = [m for m in mappings if id(m) not in ram_ids and _file(m) not in maps.segments]
    merged = [m.ksm for m in mappings if m.ksm is not None]
    segments = tuple(
        _segment(name, maps.file(path), [m for m in mappings if _file(m) == path])
        for path, name in sorted(maps.segments.items())
    )
    return GuestAccount(
        name=maps.name,
        pid=maps.pid,
        ram_path=maps.ram_path,
        ram_size=maps.ram_bytes,
        ram_private=sum(_ram_private(m) for m in ram) if known else None,
        ram_shared=sum(_ram_shared(m) for m in ram) if known else None,
        ram_proportional=_proportional(ram) if known else None,
        segments_mapped=sum(segment.mapped for segment in segments),
        segments=segments,
        segments_private=sum(segment.private for segment in segments),
        vmm_private=sum(m.private + m.swap for m in rest) if known else None,
        vmm_shared=sum(m.shared for m in rest) if known else None,
        pss_total=_proportional(mappings),
        page_tables=page_tables,
        swapped=sum(m.swap for m in mappings),
        huge=sum(m.huge for m in mappings),
        ksm=sum(merged) if merged else ksm_bytes,
        note="" if known else maps.note or _NO_RAM,
    )


def measure(maps: GuestMaps, root: Path = files.ROOT) -> GuestAccount:
    """Read the kernel's figures for a guest and make its account.

    Figures that this user may not read, or that exceed a limit, are None; ``note`` says why.

    Raises:
        NotFound: the process has ended.
        Incompatible: this kernel has no smaps.
    """
    page_tables = None
    try:
        page_tables = process.page_table_bytes(maps.pid, root)
        mappings = smaps.read(
            maps.pid, root, _LARGEST if maps.regular is None else _LARGEST_EXTERNAL
        )
        merging = ksm.read_process(maps.pid, root).merging_pages
        # A process that was ending has reported only some of its mappings.
        process.require(maps.pid, maps.start_ticks, root)
    except (NotPermitted, Unreadable) as error:
        hint = f": {error.hint}" if error.hint else ""
        return unreadable(maps, f"{error.message}{hint}", page_tables)
    return account(
        maps,
        mappings,
        page_tables=page_tables,
        ksm_bytes=None if merging is None else merging * PAGE_SIZE,
    )


def unreadable(maps: GuestMaps, note: str, page_tables: int | None = None) -> GuestAccount:
    """Make the account of a VMM of which nothing more is known."""
    return GuestAccount(
        name=maps.name,
        pid=maps.pid,
        ram_path=maps.ram_path,
        ram_size=maps.ram_bytes,
        ram_private=None,
        ram_shared=None,
        ram_proportional=None,
        segments_mapped=None,
        segments=None,
        segments_private=None,
        vmm_private=None,
        vmm_shared=None,
        pss_total=None,
        page_tables=page_tables,
        swapped=None,
        huge=None,
        ksm=None,
        note=note,
    )


def find_ram(maps: GuestMaps, mappings: Sequence[Mapping]) -> list[Mapping]:
    """Find the mappings that are the guest's RAM; none if they cannot be identified.

    With ``ram_path`` these are all mappings of that file, else anonymous ones of matching size.
    """
    if maps.note or maps.serves:
        return []
    if maps.ram_path is None:
        return _find_anonymous(maps, mappings, maps.ram_bytes)
    path = maps.ram_path.removesuffix(_DELETED)
    ram = [m for m in mappings if _file(m) == path or _file(m).startswith(path + _QEMU_FILE)]
    if not maps.ram_added:
        return ram
    added = _find_anonymous(maps, mappings, maps.ram_added)
    return [*ram, *added] if ram and added else []


def _find_anonymous(maps: GuestMaps, mappings: Sequence[Mapping], size: int) -> list[Mapping]:
    """Find adjacent anonymous (or memfd) mappings of exactly ``size`` bytes in total.

    Without an exact match this returns the smallest larger run.
    """
    runs = _adjacent(m for m in mappings if _can_be_ram(m) and _file(m) not in maps.segments)
    for run in runs:
        if exact := _window(run, size):
            return exact
    larger = [run for run in runs if sum(m.size for m in run) > size]
    return min(larger, key=lambda run: sum(m.size for m in run), default=[])


def _can_be_ram(mapping: Mapping) -> bool:
    """Whether it is readable, writable, not executable (as TCG's code buffer), and not a file's."""
    return mapping.perms.startswith("rw-") and (
        mapping.inode == 0 or mapping.path.startswith(("/memfd:", "/dev/zero"))
    )


def _adjacent(mappings: Iterable[Mapping]) -> list[list[Mapping]]:
    """Group mappings into runs without gaps, since madvise(2) and mprotect(2) split mappings.

    All mappings of a run have one path, so a memfd does not continue in an unrelated neighbour.
    """
    runs: list[list[Mapping]] = []
    for path, same in groupby(mappings, key=lambda m: m.path):
        for mapping in same:
            last = runs[-1][-1] if runs else None
            if last and last.end == mapping.start and last.path == path:
                runs[-1].append(mapping)
            else:
                runs.append([mapping])
    return runs


def _window(run: Sequence[Mapping], size: int) -> list[Mapping]:
    """Return the first mappings of a run with exactly ``size`` bytes in total, else none."""
    ends = {mapping.end: index for index, mapping in enumerate(run)}
    for first, mapping in enumerate(run):
        last = ends.get(mapping.start + size)
        if last is not None:
            return list(run[first : last + 1])
    return []


def _ram_private(mapping: Mapping) -> int:
    if mapping.perms.endswith("s"):
        return mapping.private + mapping.swap
    return mapping.anonymous - (mapping.ksm or 0) + mapping.hugetlb_private + mapping.swap


def _ram_shared(mapping: Mapping) -> int:
    if mapping.perms.endswith("s"):
        return mapping.shared
    return mapping.rss - mapping.anonymous + mapping.hugetlb_shared


def _proportional(mappings: Iterable[Mapping]) -> int | None:
    """Return the Pss; None if the kernel does not say how many processes share a hugetlb page."""
    known = list(mappings)
    if any(m.hugetlb_shared for m in known):
        return None
    return sum(m.pss + m.hugetlb_private for m in known)


def _segment(name: str, path: str, mine: Sequence[Mapping]) -> SegmentUse:
    return SegmentUse(
        name,
        path,
        mapped=sum(m.size for m in mine),
        resident=sum(m.resident for m in mine),
        private=sum(_own_copies(m) for m in mine),
        proportional=_proportional(mine),
        huge=sum(m.huge for m in mine),
    )


def _own_copies(mapping: Mapping) -> int:
    """Bytes of a segment that were copied for the guest. A page that only it maps is not a copy."""
    if not mapping.perms.endswith("s"):
        return mapping.anonymous + mapping.swap
    return mapping.private + mapping.swap if mapping.path.startswith("/memfd:") else 0


def _file(mapping: Mapping) -> str:
    return mapping.path.removesuffix(_DELETED)
