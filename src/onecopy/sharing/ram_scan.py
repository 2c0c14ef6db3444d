"""Scan the RAM of a running guest: hash each of its own pages.

Only pages that cost memory are read: those that the guest alone has. Pages of a saved system's file
and pages that KSM has merged are counted. Nothing is written, and the guest continues. A page that
changes meanwhile counts with the content that was read.

Not here: what several guests have in common (``advice``).
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

#: The hash of a page of zeroes.
ZERO = np.uint64(xxhash.xxh3_64_intdigest(bytes(PAGE_SIZE)))
#: Pages read at once, few enough to be hashed from the CPU's cache.
_CHUNK = 512
#: Bytes of RAM examined at once; the limit on the size of RAM, as a multiple of the host's memory.
_AT_ONCE, _TIMES = 1 << 30, 8
#: Bits of a pagemap entry; the last means that no other process maps the page (pagemap.rst).
_PRESENT, _FILE, _SWAPPED, _EXCLUSIVE = (np.uint64(1 << bit) for bit in (63, 61, 62, 56))
_FRAME = np.uint64((1 << 55) - 1)


class Scan(msgspec.Struct, frozen=True):
    """One guest's RAM; sizes in bytes."""

    name: str
    pid: int
    ram_size: int
    pages: Numbers
    """Indexes in RAM of the guest's own pages, ascending."""
    hashes: Hashes
    """Their hashes."""
    mergeable: Marks
    """Which of them KSM could merge: private memory, but not shared memory or hugetlb."""
    shared: int
    """Pages that are still those of a file that others can map: a saved system's."""
    merged: int | None
    """Pages merged by KSM; None if this user may not know."""
    swapped: int
    """Pages in swap, which were not read."""
    missed: int
    """Pages that disappeared before they were read."""
    note: str = ""
    """What the scan lacks; empty if it is complete."""

    @property
    def own(self) -> int:
        """Bytes that were read."""
        return len(self.pages) * PAGE_SIZE


def hash_pages(data: npt.NDArray[np.uint8]) -> Hashes:
    """Hash pages to 64-bit numbers (xxh3).

    Two of 10 million different pages collide with a probability of 3 in a million.

    Args:
        data: the pages, shape (pages, PAGE_SIZE).
    """
    return np.fromiter(map(xxhash.xxh3_64_intdigest, data), np.uint64, len(data))


def scan(maps: GuestMaps, root: Path = files.ROOT) -> Scan:
    """Read a guest's RAM.

    Raises:
        NotFound: the guest has ended, or its RAM was not found.
        NotPermitted: this user may not trace the process.
        Unreadable: its RAM is larger than this host could have.
    """
    ram = find_ram(maps, smaps.read(maps.pid, root))
    if not ram:
        raise NotFound(
            maps.note or f"the RAM of {maps.name} was not found in the memory map of QEMU"
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


_HIDDEN = "the kernel shows only root which pages are merged, so their number is unknown"


class _Part(msgspec.Struct, frozen=True):
    """The scan of one mapping."""

    pages: Numbers
    hashes: Hashes
    mergeable: Marks
    shared: int
    merged: int | None
    swapped: int
    missed: int


def _require_sensible(size: int) -> None:
    """Refuse mappings that cost the process nothing but would take hours to scan."""
    memory = meminfo.read()
    most = _TIMES * ((memory.total or 0) + (memory.swap_total or 0))
    if size > most:
        raise Unreadable(f"its RAM, {format_size(size)}, is {_TIMES} times more than this host has")


def _scan(pid: int, mapping: Mapping, start: int, size: int, first: int, root: Path) -> _Part:
    """Scan ``size`` bytes from ``start``; the first page has the index ``first`` in RAM."""
    entries = np.frombuffer(pagemap.read(pid, start, size // PAGE_SIZE, root), np.uint64)
    present = (entries & _PRESENT) != 0
    private = mapping.perms.endswith("p")
    own, elsewhere = present, np.zeros_like(present)
    if private:
        ours = present & ((entries & _FILE) == 0)
        # QEMU does not fork, so a page that is also mapped elsewhere is merged or the zero page.
        own = ours & ((entries & _EXCLUSIVE) != 0)
        elsewhere = ours & ~own
    merged = _merged(entries[elsewhere] & _FRAME, root)
    pages = np.flatnonzero(own)
    hashes, present_pages = _read(pid, start, pages)
    missed = len(pages) - np.count_nonzero(present_pages)
    pages = pages[present_pages]
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
    """Return the bytes of some page frames, except for the zero page, which was perhaps only read.

    The flag for merged pages is not reliable: Linux 6.10 to 6.12 and some later versions set it for
    all anonymous memory (fs/proc/page.c).

    Returns:
        None if the kernel hides the frames by showing frame 0.
    """
    if not numbers.all():
        return None
    try:
        return _bytes((frame_flags.flags(numbers, root) & np.uint64(Flags.ZERO_PAGE)) == 0)
    except NotPermitted:
        return None


def _read(pid: int, start: int, pages: Numbers) -> tuple[Hashes, Marks]:
    """Return the hashes of the pages that are present, and a mask of these."""
    buffer = np.empty((_CHUNK, PAGE_SIZE), np.uint8)
    hashes, present_pages = [np.empty(0, np.uint64)], [np.empty(0, np.bool_)]
    for at in range(0, len(pages), _CHUNK):
        part = pages[at : at + _CHUNK].astype(np.uint64)
        found = process_memory.read(pid, np.uint64(start) + part * np.uint64(PAGE_SIZE), buffer)
        data = buffer[: len(part)]
        # Indexing by a mask copies the data.
        hashes.append(hash_pages(data if found.all() else data[found]))
        present_pages.append(found)
    return np.concatenate(hashes), np.concatenate(present_pages)


def _bytes(marks: Marks) -> int:
    return int(np.count_nonzero(marks)) * PAGE_SIZE


def _sum(figures: list[int | None]) -> int | None:
    known = [figure for figure in figures if figure is not None]
    return sum(known) if len(known) == len(figures) else None
