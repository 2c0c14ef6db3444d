"""One guest's account: which of its memory is its own, and which it shares.

Not here: many guests together (``report``), reading smaps (``onecopy.linux.counters.smaps``).
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

#: Bytes of a memory map that are read: 60 times what a QEMU has, and of our own all that the kernel
#: lets it have.
_MOST_OF_OTHERS, _MOST = 16 << 20, 128 << 20
_DELETED = " (deleted)"
#: What QEMU calls a file that it makes in a folder (system/physmem.c, file_ram_open).
_MADE = "/qemu_back_mem."


class GuestMaps(msgspec.Struct, frozen=True):
    """What must be known of a guest to read its account; paths are real paths."""

    name: str
    #: The VMM's process.
    pid: int
    #: The file that backs the guest's RAM (a saved system's), or a folder where QEMU makes one
    #: (hugetlbfs); None when no file was given to QEMU.
    ram_path: str | None
    ram_bytes: int
    #: Path of a segment's blob -> the segment's name.
    segments: MappingOf[str, str] = msgspec.field(default_factory=dict)
    #: Path that the VMM maps -> that of the same file in the store, where they differ.
    files: MappingOf[str, str] = msgspec.field(default_factory=dict)
    #: How much of ``ram_bytes`` came while the guest ran: anonymous, whatever backs the rest.
    ram_added: int = 0
    #: Its RAM is open to KSM; that of a trust domain is not, since KSM knows none.
    mergeable: bool = True
    #: When the VMM was started: with ``pid``, its identity. None: whatever has this pid.
    start_ticks: int | None = None
    #: Why its RAM cannot be told; empty if it can.
    note: str = ""
    #: Of another's QEMU: which of these paths may be opened, and which files they are. None: all.
    regular: MappingOf[str, Identity] | None = None

    def file(self, path: str) -> str:
        """The name by which all guests' mappings of a segment's file are known."""
        return self.files.get(path, path)


class SegmentUse(msgspec.Struct, frozen=True):
    """One segment in one guest; figures in bytes, None is unknown."""

    name: str
    path: str
    #: Address space; 0 when the guest does not map it (now).
    mapped: int
    #: In memory and in this process's page tables (Rss).
    resident: int
    #: The guest's own copies of its pages, in memory or swap.
    private: int
    #: What is resident, each page divided by the number of processes that map it (Pss).
    proportional: int | None
    #: What of it is in huge pages.
    huge: int


class GuestAccount(msgspec.Struct, frozen=True):
    """One guest's memory in bytes; None is unknown. ``report.COLUMNS`` says what each counts."""

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
    #: Why figures are missing; empty when none is.
    note: str = ""


def account(
    maps: GuestMaps,
    mappings: Sequence[Mapping],
    *,
    page_tables: int | None = None,
    ksm_bytes: int | None = None,
) -> GuestAccount:
    """The account of one VMM from its mappings (in address order).

    ``page_tables`` and ``ksm_bytes`` (bytes) are the process's own figures; the latter serves
    where the mappings do not tell. If the RAM is not found, what needs it is None.
    """
    ram = find_ram(maps, mappings)
    told_apart = {id(m) for m in ram}
    rest = [m for m in mappings if id(m) not in told_apart and _file(m) not in maps.segments]
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
        ram_private=sum(_ram_private(m) for m in ram) if ram else None,
        ram_shared=sum(_ram_shared(m) for m in ram) if ram else None,
        ram_proportional=_proportional(ram) if ram else None,
        segments_mapped=sum(segment.mapped for segment in segments),
        segments=segments,
        segments_private=sum(segment.private for segment in segments),
        vmm_private=sum(m.private + m.swap for m in rest) if ram else None,
        vmm_shared=sum(m.shared for m in rest) if ram else None,
        pss_total=_proportional(mappings),
        page_tables=page_tables,
        swapped=sum(m.swap for m in mappings),
        huge=sum(m.huge for m in mappings),
        ksm=sum(merged) if merged else ksm_bytes,
        note="" if ram else maps.note or "the guest's RAM was not found in its memory map",
    )


def measure(maps: GuestMaps, root: Path = files.ROOT) -> GuestAccount:
    """Read the kernel's figures for a guest and make its account.

    What this user may not read, or nobody in bounds, stays None, and ``note`` says so. Raises
    NotFound when the process is gone, Incompatible on a kernel without smaps.
    """
    page_tables = None
    try:
        page_tables = process.page_table_bytes(maps.pid, root)
        mappings = smaps.read(maps.pid, root, _MOST if maps.regular is None else _MOST_OF_OTHERS)
        merging = ksm.read_process(maps.pid, root).merging_pages
        # One that was ending has told only some of it.
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
    """The account of a VMM of which nothing more is known."""
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
    """The mappings that are the guest's RAM; none when they cannot be told.

    With ``ram_path`` all mappings of that file, else anonymous ones of its size (_find_anonymous).
    """
    if maps.note:
        return []
    if maps.ram_path is None:
        return _find_anonymous(maps, mappings, maps.ram_bytes)
    path = maps.ram_path.removesuffix(_DELETED)
    ram = [m for m in mappings if _file(m) == path or _file(m).startswith(path + _MADE)]
    if not maps.ram_added:
        return ram
    added = _find_anonymous(maps, mappings, maps.ram_added)
    return [*ram, *added] if ram and added else []


def _find_anonymous(maps: GuestMaps, mappings: Sequence[Mapping], size: int) -> list[Mapping]:
    """Adjacent anonymous (or memfd) mappings that make up exactly ``size`` bytes.

    Failing that the smallest such run that is larger.
    """
    runs = _adjacent(m for m in mappings if _can_be_ram(m) and _file(m) not in maps.segments)
    for run in runs:
        if exact := _window(run, size):
            return exact
    larger = [run for run in runs if sum(m.size for m in run) > size]
    return min(larger, key=lambda run: sum(m.size for m in run), default=[])


def _can_be_ram(mapping: Mapping) -> bool:
    """Readable, writable, not executable (TCG's code buffer is), and no file of a file system."""
    return mapping.perms.startswith("rw-") and (
        mapping.inode == 0 or mapping.path.startswith(("/memfd:", "/dev/zero"))
    )


def _adjacent(mappings: Iterable[Mapping]) -> list[list[Mapping]]:
    """Split into runs that leave no gap: madvise(2) and mprotect(2) split one mapping in several.

    One run has one path: a memfd does not go on in what happens to lie behind it.
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
    """The first mappings of a run that together are exactly ``size`` bytes; else none."""
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
    """Pss; None when the kernel does not tell how many processes share a hugetlb page."""
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
        private=sum(_own(m) for m in mine),
        proportional=_proportional(mine),
        huge=sum(m.huge for m in mine),
    )


def _own(mapping: Mapping) -> int:
    """Copies that a guest has of a segment's pages; one that it alone maps is still the file's."""
    if not mapping.perms.endswith("s"):
        return mapping.anonymous + mapping.swap
    return mapping.private + mapping.swap if mapping.path.startswith("/memfd:") else 0


def _file(mapping: Mapping) -> str:
    return mapping.path.removesuffix(_DELETED)
