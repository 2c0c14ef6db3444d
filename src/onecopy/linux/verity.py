"""fs-verity: the kernel verifies what it reads of a file and refuses all writes to it.

ext4, f2fs and btrfs support it if the kernel and the file system have the feature.

Not here: which files get it (store/ingest.py).

Source:
    linux/fsverity.h, Linux Documentation/filesystems/fsverity.rst.
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
_SHA256, _DIGEST_SIZE = 1, 64
#: These errors mean that fs-verity is not available: no such call, no support by the file system,
#: or not enabled.
_UNAVAILABLE = {errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


def enable(path: Path) -> bool:
    """Enable fs-verity for a file that nobody has open for writing.

    Only its owner and root may. The kernel reads the whole file, holes included.

    Returns:
        Whether it is enabled; False if fs-verity is not available.

    Raises:
        OSError: the kernel refused for another reason.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enable(fd)
        _drop_holes(fd)
    except OSError as error:
        if error.errno == errno.EEXIST:
            return True
        if error.errno in _UNAVAILABLE:
            return False
        raise
    finally:
        os.close(fd)
    return True


def _enable(fd: int) -> None:
    argument = struct.pack("=IIII24xQ", 1, _SHA256, mmap.PAGESIZE, 0, 0).ljust(128, b"\0")
    mode = os.fstat(fd).st_mode
    # The kernel requires write permission on the file, even from its owner.
    os.fchmod(fd, mode | 0o200)
    try:
        fcntl.ioctl(fd, _ENABLE, argument)
    finally:
        os.fchmod(fd, mode)


def _drop_holes(fd: int) -> None:
    """Drop the zeroes that the kernel has read for holes from the page cache."""
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
    """Whether fs-verity is enabled for a file.

    Raises:
        OSError: the file cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _MEASURE, bytearray(struct.pack("=HH", 0, _DIGEST_SIZE)) + bytes(64))
    except OSError as error:
        if error.errno in _UNAVAILABLE | {errno.ENODATA}:
            return False
        raise
    finally:
        os.close(fd)
    return True
