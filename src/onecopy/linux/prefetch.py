"""Bringing parts of a file into the host's page cache, and dropping it from there.

Not here: what is in it (linux/counters/residency.py), which parts are worth it
(guest/pagecache/preload.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from onecopy.linux import files

#: (first byte, bytes) in a file.
Extent = tuple[int, int]
#: Of one request the kernel reads no more than the device's own limit, or its read-ahead
#: (mm/readahead.c, force_page_cache_ra), and says nothing of the rest: both are this or more
#: unless someone set them lower.
_PIECE = 128 << 10
_BUFFER = 1 << 20


def read_ahead(path: Path, root: Path = files.ROOT) -> int | None:
    """Bytes that the kernel reads around what is read or mapped in files of that file system.

    None if it does not tell (Documentation/ABI/testing/sysfs-class-bdi, stable/sysfs-block).
    """
    number = path.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    disk = (root / "sys/dev/block" / name).resolve()
    # What is no disk has the first alone; a partition has the last, its disk's.
    for folder in (root / "sys/class/bdi" / name, disk / "queue", disk.parent / "queue"):
        found = files.read_number(folder / "read_ahead_kb")
        if found is not None:
            return found << 10
    return None


def begin(path: Path, extents: Iterable[Extent]) -> None:
    """Have the kernel read parts of a file, without waiting for what it reads; raise OSError.

    What is in the page cache already costs a look at each page.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for extent in extents:
            for offset, size in _pieces(extent, _PIECE):
                os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(fd)


def load(path: Path, extents: Iterable[Extent]) -> None:
    """Read parts of a file and wait until they are there; raise OSError.

    They stay as long as the kernel has no better use for the memory.
    """
    extents = list(extents)
    begin(path, extents)
    buffer = [bytearray(_BUFFER)]
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for extent in extents:
            for offset, size in _pieces(extent, _BUFFER):
                part = buffer if size == _BUFFER else [memoryview(buffer[0])[:size]]
                os.preadv(fd, part, offset)
    finally:
        os.close(fd)


def drop(path: Path) -> None:
    """Drop what is clean and mapped by nobody from the page cache, as far as the kernel will.

    Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _pieces(extent: Extent, size: int) -> Iterable[Extent]:
    start, length = extent
    for offset in range(start, start + length, size):
        yield offset, min(size, start + length - offset)
