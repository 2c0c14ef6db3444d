"""How much of a file is in the host's page cache, whoever read it.

cachestat(2) where the kernel has it, else mincore(2) over a mapping of the file. Not here: which
process maps it (``smaps``).
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
#: mincore(2) takes a byte for each page: a sparse file may have more of them than there is memory.
_LARGEST = 4 << 40


class _Range(ctypes.Structure):
    """struct cachestat_range; a length of 0 means to the file's end."""

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
    """Bytes of the file in the page cache; None when the kernel does not tell this user.

    Raises NotFound (also when it is not ``same_as``), NotPermitted when the file may not be read,
    InvalidInput when it is none.
    """
    with _opened(path, same_as) as fd:
        # Of the last page only what belongs to the file.
        size = os.fstat(fd).st_size
        try:
            return min(_cachestat(fd), size)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
                return None
        pages = _mincore(fd)
    return None if pages is None else min(pages.count(1) * PAGE_SIZE, size)


def resident_pages(path: Path) -> bytes | None:
    """One byte per page of the file: 1 in the page cache, 0 not; None when not told.

    The kernel tells only who owns the file or may write it (mincore(2)). Raises as
    ``resident_bytes`` does.
    """
    with _opened(path, None) as fd:
        return _mincore(fd)


@contextmanager
def _opened(path: Path, same_as: Identity | None) -> Iterator[int]:
    fd = open_regular(path, same_as)
    try:
        yield fd
    finally:
        os.close(fd)


def _cachestat(fd: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    whole, told = _Range(0, 0), _Stat()
    if libc.syscall(
        ctypes.c_long(_SYS_CACHESTAT), fd, ctypes.byref(whole), ctypes.byref(told), ctypes.c_uint(0)
    ):
        raise OSError(ctypes.get_errno(), "cachestat")
    return int(told.nr_cache) * PAGE_SIZE


def _mincore(fd: int) -> bytes | None:
    file = os.fstat(fd)
    # To others the kernel says that every page is resident (mm/mincore.c, can_do_mincore).
    if file.st_uid != os.geteuid() and not os.access(f"/proc/self/fd/{fd}", os.W_OK):
        return None
    if not file.st_size:
        return b""
    if file.st_size > _LARGEST:
        return None
    pages = (ctypes.c_ubyte * -(-file.st_size // PAGE_SIZE))()
    # Python's own mmap gives no address for a read-only mapping.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = ctypes.c_size_t(file.st_size)
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    if address == _MAP_FAILED:
        reason = os.strerror(ctypes.get_errno())
        raise InvalidInput(f"the file cannot be mapped: {reason}", hint="name a regular file")
    try:
        if libc.mincore(ctypes.c_void_p(address), size, pages):
            raise OSError(ctypes.get_errno(), "mincore")
    finally:
        libc.munmap(ctypes.c_void_p(address), size)
    # Only the lowest bit means something.
    return bytes(page & 1 for page in pages)
