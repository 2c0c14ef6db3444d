"""Load parts of a file into the host's page cache, or drop a file from it.

Not here: what is cached (linux/counters/residency.py), and which parts are worth loading
(guest/pagecache/preload.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from onecopy.linux import files

#: (first byte, number of bytes) in a file.
Extent = tuple[int, int]
#: One request reads at most the device's limit or its read-ahead (mm/readahead.c,
#: force_page_cache_ra), and the rest is silently skipped. Both limits are at least this large by
#: default.
_PIECE = 128 << 10
_BUFFER = 1 << 20


def read_ahead(path: Path, root: Path = files.ROOT) -> int | None:
    """Return the read-ahead in bytes of the file system that holds ``path``.

    Returns:
        None if the kernel does not say.

    Source:
        Linux Documentation/ABI/testing/sysfs-class-bdi, stable/sysfs-block.
    """
    number = path.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    disk = (root / "sys/dev/block" / name).resolve()
    # Only the first exists if there is no disk; a partition's value is its disk's, the last.
    for folder in (root / "sys/class/bdi" / name, disk / "queue", disk.parent / "queue"):
        found = files.read_number(folder / "read_ahead_kb")
        if found is not None:
            return found << 10
    return None


def begin(path: Path, extents: Iterable[Extent]) -> None:
    """Have the kernel read parts of a file, without waiting for the data.

    Parts in the page cache cost one lookup for each page.

    Raises:
        OSError: the file cannot be opened or read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for extent in extents:
            for offset, size in _pieces(extent, _PIECE):
                os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(fd)


def load(path: Path, extents: Iterable[Extent]) -> None:
    """Read parts of a file into the page cache and wait until they are there.

    They stay until the kernel needs the memory for something else.

    Raises:
        OSError: the file cannot be opened or read.
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
    """Drop a file's clean, unmapped pages from the page cache, as far as the kernel agrees.

    Raises:
        OSError: the file cannot be opened.
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
