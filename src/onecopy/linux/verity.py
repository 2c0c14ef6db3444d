"""fs-verity: the kernel checks what it reads of a file, and lets nobody write to it again.

linux/fsverity.h, Documentation/filesystems/fsverity.rst. ext4, f2fs and btrfs have it, where the
kernel and the file system were made with it. Not here: which files get it (store/ingest.py).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from pathlib import Path

_ENABLE = 0x40806685  # FS_IOC_ENABLE_VERITY: _IOW('f', 133, struct fsverity_enable_arg)
_MEASURE = 0xC0046686  # FS_IOC_MEASURE_VERITY: _IOWR('f', 134, struct fsverity_digest)
_SHA256, _DIGEST_ROOM = 1, 64
#: What says that there is none here: no such call, the file system has none or it is not on.
_NONE = {errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


def enable(path: Path) -> bool:
    """Switch fs-verity on for a file that nobody has open for writing; whether it is on.

    Only its owner and root may. The kernel reads all of it, holes included. Raises OSError, but not
    where there is no fs-verity.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enable(fd)
        _forget_holes(fd)
    except OSError as error:
        if error.errno == errno.EEXIST:
            return True
        if error.errno in _NONE:
            return False
        raise
    finally:
        os.close(fd)
    return True


def _enable(fd: int) -> None:
    argument = struct.pack("=IIII24xQ", 1, _SHA256, mmap.PAGESIZE, 0, 0).ljust(128, b"\0")
    mode = os.fstat(fd).st_mode
    # Whoever may not write the file may not do this either, not even its owner.
    os.fchmod(fd, mode | 0o200)
    try:
        fcntl.ioctl(fd, _ENABLE, argument)
    finally:
        os.fchmod(fd, mode)


def _forget_holes(fd: int) -> None:
    """Drop from the page cache what the kernel has read of holes: zeroes."""
    size, end = os.fstat(fd).st_size, 0
    while (start := os.lseek(fd, end, os.SEEK_HOLE)) < size:
        try:
            end = os.lseek(fd, start, os.SEEK_DATA)
        except OSError:  # a hole up to the end
            end = size
        os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)
        if end >= size:
            return


def is_enabled(path: Path) -> bool:
    """Whether fs-verity is on for a file; raise OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _MEASURE, bytearray(struct.pack("=HH", 0, _DIGEST_ROOM)) + bytes(64))
    except OSError as error:
        if error.errno in _NONE | {errno.ENODATA}:
            return False
        raise
    finally:
        os.close(fd)
    return True
