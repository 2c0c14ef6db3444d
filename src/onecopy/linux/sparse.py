"""Sparse files: find their data and copy them without filling holes.

Not here: digests of them (store/digest.py).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each data range below ``size`` (lseek(2), SEEK_DATA)."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start < end:
            yield start, end


def copy_file(source: int, size: int, out: Path) -> None:
    """Copy the first ``size`` bytes of an open file to the new file ``out``.

    Raises:
        OSError: the file cannot be copied.
    """
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
        for start, end in data_ranges(source, size):
            at = start
            while at < end:
                # The kernel shares disk blocks between the files if the file system can.
                copied = os.copy_file_range(source, fd, end - at, at, at)
                if not copied:
                    raise OSError(errno.EIO, "the file became shorter while it was copied")
                at += copied
    finally:
        os.close(fd)
