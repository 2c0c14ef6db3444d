"""How much of a file is in the host's page cache.

It uses cachestat(2) if the kernel has it, else mincore(2) on a mapping of the file.

Not here: which process maps the file (``smaps``).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onecopy.errors import InvalidInput
from onecopy.linux.files import Identity, open_regular
from onecopy.model import PAGE_SIZE

_SYS_CACHESTAT = 451  # the same on every architecture
_MAP_FAILED = ctypes.c_void_p(-1).value
#: mincore(2) needs one byte for each page, which for a sparse file may exceed the host's memory.
_LARGEST = 4 << 40


class _Range(ctypes.Structure):
    """struct cachestat_range; the length 0 means up to the end of the file."""

    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Stat(ctypes.Structure):
    """struct cachestat, all in pages (include/uapi/linux/mman.h)."""

    _fields_ = (
        ("nr_cache", ctypes.c_uint64),
        ("nr_dirty", ctypes.c_uint64),
        ("nr_writeback", ctypes.c_uint64),
        ("nr_evicted", ctypes.c_uint64),
        ("nr_recently_evicted", ctypes.c_uint64),
    )


def resident_bytes(path: Path, same_as: Identity | None = None) -> int | None:
    """Return how many bytes of a file are in the page cache.

    Args:
        same_as: the file that the path must still refer to.

    Returns:
        None if the kernel does not tell this user.

    Raises:
        NotFound: the file does not exist or was replaced.
        NotPermitted: this user may not read it.
        InvalidInput: it is not a regular file.
    """
    with _open(path, same_as) as fd:
        # The last page may extend beyond the end of the file.
        size = os.fstat(fd).st_size
        try:
            return min(_cachestat(fd), size)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
                return None
        pages = _mincore(fd)
    return None if pages is None else min(pages.count(1) * PAGE_SIZE, size)


def resident_pages(path: Path) -> bytes | None:
    """Return one byte per page of a file: 1 if the page is in the page cache, else 0.

    The kernel tells only users who own the file or may write to it (mincore(2)).

    Returns:
        None if the kernel does not tell this user.

    Raises:
        NotFound: the file does not exist.
        NotPermitted: this user may not read it.
        InvalidInput: it is not a regular file.
    """
    with _open(path, None) as fd:
        return _mincore(fd)


@contextmanager
def _open(path: Path, same_as: Identity | None) -> Iterator[int]:
    fd = open_regular(path, same_as)
    try:
        yield fd
    finally:
        os.close(fd)


def _cachestat(fd: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    whole, result = _Range(0, 0), _Stat()
    if libc.syscall(
        ctypes.c_long(_SYS_CACHESTAT),
        fd,
        ctypes.byref(whole),
        ctypes.byref(result),
        ctypes.c_uint(0),
    ):
        raise OSError(ctypes.get_errno(), "cachestat")
    return int(result.nr_cache) * PAGE_SIZE


def _mincore(fd: int) -> bytes | None:
    file = os.fstat(fd)
    # To other users the kernel reports every page as resident (mm/mincore.c, can_do_mincore).
    if file.st_uid != os.geteuid() and not os.access(f"/proc/self/fd/{fd}", os.W_OK):
        return None
    if not file.st_size:
        return b""
    if file.st_size > _LARGEST:
        return None
    pages = (ctypes.c_ubyte * -(-file.st_size // PAGE_SIZE))()
    # Python's mmap does not reveal the address of a read-only mapping.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = ctypes.c_size_t(file.st_size)
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    if address == _MAP_FAILED:
        reason = os.strerror(ctypes.get_errno())
        raise InvalidInput(f"cannot map the file: {reason}", hint="name a regular file")
    try:
        if libc.mincore(ctypes.c_void_p(address), size, pages):
            raise OSError(ctypes.get_errno(), "mincore")
    finally:
        libc.munmap(ctypes.c_void_p(address), size)
    # Only the lowest bit is defined.
    return bytes(page & 1 for page in pages)
