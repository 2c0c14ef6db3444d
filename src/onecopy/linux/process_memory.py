"""Read many pages of another process at once (process_vm_readv(2)).

The process is not disturbed. Callers should name only pages that are in memory, because the kernel
would bring in others. Reading takes the right to trace the process (PTRACE_MODE_ATTACH).

Not here: which pages to read (``pagemap``).
"""

from __future__ import annotations

import ctypes
import errno
import os

import numpy as np
import numpy.typing as npt

from onecopy.errors import NotPermitted, Unreadable
from onecopy.linux.bounded_wait import going_on
from onecopy.linux.files import no_process
from onecopy.model import PAGE_SIZE

#: The number of ranges in one call (uio.h, UIO_MAXIOV).
_RANGES = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


def read(
    pid: int, addresses: npt.NDArray[np.uint64], into: npt.NDArray[np.uint8]
) -> npt.NDArray[np.bool_]:
    """Copy pages of a process.

    Args:
        addresses: byte addresses of the pages, ascending, shape (pages,).
        into: receives the content, shape (pages, PAGE_SIZE).

    Returns:
        A mask of the pages that were present; rows of other pages are undefined.

    Raises:
        NotFound: the process has ended.
        NotPermitted: this user may not trace the process.
        Unreadable: the kernel refused for another reason.
    """
    present = np.ones(len(addresses), np.bool_)
    at = 0
    while at < len(addresses):
        ranges, count = _ranges(addresses[at:])
        done = _read(pid, ranges, into[at:])
        going_on()
        at += done
        if done < count:
            present[at] = False
            at += 1
    return present


def _ranges(addresses: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], int]:
    """Merge adjacent leading pages; return (address, bytes) of each range and the page count."""
    gaps = np.flatnonzero(addresses[1:] - addresses[:-1] != PAGE_SIZE)[:_RANGES] + 1
    edges = np.concatenate(([0], gaps, [len(addresses)]))[: _RANGES + 1]
    ranges = np.empty((len(edges) - 1, 2), np.uint64)
    ranges[:, 0] = addresses[edges[:-1]]
    ranges[:, 1] = np.diff(edges) * PAGE_SIZE
    return ranges, int(edges[-1])


def _read(pid: int, ranges: npt.NDArray[np.uint64], into: npt.NDArray[np.uint8]) -> int:
    """Return how many pages were copied before a missing one."""
    # A row of two 64-bit numbers has the layout of struct iovec.
    ours = np.array([[into.ctypes.data, into.nbytes]], np.uint64)
    size = _libc.process_vm_readv(
        ctypes.c_int(pid),
        ctypes.c_void_p(ours.ctypes.data),
        ctypes.c_ulong(1),
        ctypes.c_void_p(ranges.ctypes.data),
        ctypes.c_ulong(len(ranges)),
        ctypes.c_ulong(0),
    )
    if size >= 0:
        return int(size) // PAGE_SIZE
    number = ctypes.get_errno()
    if number == errno.EFAULT:
        return 0
    if number == errno.ESRCH:
        raise no_process(pid)
    if number == errno.EPERM:
        raise NotPermitted(
            f"cannot read the memory of process {pid}: permission denied",
            hint="run the command as root or as the process's user",
        )
    raise Unreadable(f"cannot read the memory of process {pid}: {os.strerror(number)}")
