"""Look at the RAM of one running guest: what stands in each of its pages.

Only pages that cost memory are read: those that are the guest's alone. Pages of a saved system's
file, and what KSM has merged already, are counted. Nothing is written, and the guest goes on; a
page that changes meanwhile is what it was when it was read. Not here: what the pages of several
guests have in common (``advice``).
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from onecopy.errors import NotFound, NotPermitted, Unreadable
from onecopy.linux import files, process, process_memory
from onecopy.linux.counters import frame_flags, meminfo, pagemap, smaps
from onecopy.linux.counters.kpage import Flags
from onecopy.linux.counters.smaps import Mapping
from onecopy.model import PAGE_SIZE, format_size
from onecopy.sharing.account import GuestMaps, find_ram

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]

#: What a page of zeroes hashes to.
ZERO = np.uint64(xxhash.xxh3_64_intdigest(bytes(PAGE_SIZE)))
#: Pages that are read at once: they are hashed while they are in the processor's cache.
_CHUNK = 512
#: Bytes of RAM whose pages are looked for at once, and how often the host's memory RAM may be.
_AT_ONCE, _TIMES = 1 << 30, 8
#: Bits of a pagemap entry; the last: the page is mapped here and nowhere else (pagemap.rst).
_PRESENT, _FILE, _SWAPPED, _EXCLUSIVE = (np.uint64(1 << bit) for bit in (63, 61, 62, 56))
_FRAME = np.uint64((1 << 55) - 1)


class Scan(msgspec.Struct, frozen=True):
    """One guest's RAM; sizes in bytes."""

    name: str
    pid: int
    ram_size: int
    pages: Numbers
    """Numbers in RAM of the pages that are this guest's alone, ascending."""
    hashes: Hashes
    """Their contents."""
    mergeable: Marks
    """Which of them KSM could merge: private memory, not shared memory or hugetlb."""
    shared: int
    """Still pages of a file that others can map, too: a saved system's."""
    merged: int | None
    """Merged by KSM already; None when this user may not know."""
    swapped: int
    """In swap, and not looked at."""
    missed: int
    """Gone before they were read."""
    note: str = ""
    """What this scan lacks; empty when it is whole."""

    @property
    def own(self) -> int:
        """Bytes that were read."""
        return len(self.pages) * PAGE_SIZE


def hash_pages(data: npt.NDArray[np.uint8]) -> Hashes:
    """The contents of pages, of shape (pages, PAGE_SIZE), as 64-bit numbers (xxh3).

    Among 10 million different pages two have one number with a probability of 3 in a million.
    """
    return np.fromiter(map(xxhash.xxh3_64_intdigest, data), np.uint64, len(data))


def scan(maps: GuestMaps, root: Path = files.ROOT) -> Scan:
    """Read a guest's RAM.

    Raises NotFound when it is gone, ends meanwhile, or its RAM is not found; NotPermitted;
    Unreadable when that is more than this host could have.
    """
    ram = find_ram(maps, smaps.read(maps.pid, root))
    if not ram:
        raise NotFound(
            maps.note or f"the RAM of {maps.name} was not found in the memory of its QEMU"
        )
    _require_sensible(sum(mapping.size for mapping in ram))
    first, parts = 0, []
    for mapping in ram:
        for start in range(mapping.start, mapping.end, _AT_ONCE):
            size = min(_AT_ONCE, mapping.end - start)
            parts.append(_scan(maps.pid, mapping, start, size, first, root))
            first += size // PAGE_SIZE
    process.require(maps.pid, maps.start_ticks, root)
    merged = _sum([part.merged for part in parts])
    return Scan(
        name=maps.name,
        pid=maps.pid,
        ram_size=maps.ram_bytes,
        pages=np.concatenate([part.pages for part in parts]),
        hashes=np.concatenate([part.hashes for part in parts]),
        mergeable=np.concatenate([part.mergeable for part in parts]) & maps.mergeable,
        shared=sum(part.shared for part in parts),
        merged=merged,
        swapped=sum(part.swapped for part in parts),
        missed=sum(part.missed for part in parts),
        note="" if merged is not None else _HIDDEN,
    )


_HIDDEN = "the kernel shows only root which pages are merged: how much that is, is unknown"


class _Part(msgspec.Struct, frozen=True):
    """The same for one mapping."""

    pages: Numbers
    hashes: Hashes
    mergeable: Marks
    shared: int
    merged: int | None
    swapped: int
    missed: int


def _require_sensible(size: int) -> None:
    """A process can map what takes hours to look through, and costs it nothing."""
    memory = meminfo.read()
    most = _TIMES * ((memory.total or 0) + (memory.swap_total or 0))
    if size > most:
        raise Unreadable(f"its RAM, {format_size(size)}, is {_TIMES} times more than this host has")


def _scan(pid: int, mapping: Mapping, start: int, size: int, first: int, root: Path) -> _Part:
    """``size`` bytes from ``start`` on, whose first page is the one numbered ``first`` in RAM."""
    entries = np.frombuffer(pagemap.read(pid, start, size // PAGE_SIZE, root), np.uint64)
    present = (entries & _PRESENT) != 0
    private = mapping.perms.endswith("p")
    own, elsewhere = present, np.zeros_like(present)
    if private:
        ours = present & ((entries & _FILE) == 0)
        # A QEMU does not fork: what is mapped elsewhere, too, is merged or the zero page.
        own = ours & ((entries & _EXCLUSIVE) != 0)
        elsewhere = ours & ~own
    merged = _merged(entries[elsewhere] & _FRAME, root)
    pages = np.flatnonzero(own)
    hashes, there = _read(pid, start, pages)
    missed = len(pages) - np.count_nonzero(there)
    pages = pages[there]
    huge = mapping.hugetlb_private + mapping.hugetlb_shared
    return _Part(
        pages=pages + first,
        hashes=hashes,
        mergeable=np.full(len(pages), private and not huge),
        shared=_bytes(present & ~own & ~elsewhere),
        merged=merged,
        swapped=_bytes((entries & _SWAPPED) != 0),
        missed=int(missed) * PAGE_SIZE,
    )


def _merged(numbers: npt.NDArray[np.uint64], root: Path) -> int | None:
    """Bytes of those page frames, but for the zero page, which may have only been read.

    None when the kernel hides them: it shows frame 0. The flag of merged pages is no sign: Linux
    6.10 to 6.12, and some later ones, set it for all anonymous memory (fs/proc/page.c).
    """
    if not numbers.all():
        return None
    try:
        return _bytes((frame_flags.flags(numbers, root) & np.uint64(Flags.ZERO_PAGE)) == 0)
    except NotPermitted:
        return None


def _read(pid: int, start: int, pages: Numbers) -> tuple[Hashes, Marks]:
    """The contents of those pages that are there, and which these are."""
    buffer = np.empty((_CHUNK, PAGE_SIZE), np.uint8)
    hashes, there = [np.empty(0, np.uint64)], [np.empty(0, np.bool_)]
    for at in range(0, len(pages), _CHUNK):
        part = pages[at : at + _CHUNK].astype(np.uint64)
        found = process_memory.read(pid, np.uint64(start) + part * np.uint64(PAGE_SIZE), buffer)
        data = buffer[: len(part)]
        # Indexing by marks copies.
        hashes.append(hash_pages(data if found.all() else data[found]))
        there.append(found)
    return np.concatenate(hashes), np.concatenate(there)


def _bytes(marks: Marks) -> int:
    return int(np.count_nonzero(marks)) * PAGE_SIZE


def _sum(figures: list[int | None]) -> int | None:
    known = [figure for figure in figures if figure is not None]
    return sum(known) if len(known) == len(figures) else None
