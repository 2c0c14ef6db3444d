"""Reading pages of another process, many at once (process_vm_readv(2)).

The process does not notice: nothing is written, and only pages that are in memory should be asked
for, since others would be brought in. Takes the rights to trace it (PTRACE_MODE_ATTACH). Not here:
which pages are worth reading (``pagemap``).
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

#: What one call may name (uio.h, UIO_MAXIOV).
_RANGES = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


def read(
    pid: int, addresses: npt.NDArray[np.uint64], into: npt.NDArray[np.uint8]
) -> npt.NDArray[np.bool_]:
    """Copy the pages at ``addresses`` (bytes, ascending) to ``into``: shape (pages, PAGE_SIZE).

    Returns which pages were there; the others are undefined in ``into``. Raises NotFound when the
    process is gone, NotPermitted, Unreadable.
    """
    there = np.ones(len(addresses), np.bool_)
    at = 0
    while at < len(addresses):
        ranges, count = _ranges(addresses[at:])
        done = _read(pid, ranges, into[at:])
        going_on()
        at += done
        if done < count:
            there[at] = False
            at += 1
    return there


def _ranges(addresses: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], int]:
    """The first pages as (address, bytes) of adjacent ones, and how many pages that are."""
    gaps = np.flatnonzero(addresses[1:] - addresses[:-1] != PAGE_SIZE)[:_RANGES] + 1
    edges = np.concatenate(([0], gaps, [len(addresses)]))[: _RANGES + 1]
    ranges = np.empty((len(edges) - 1, 2), np.uint64)
    ranges[:, 0] = addresses[edges[:-1]]
    ranges[:, 1] = np.diff(edges) * PAGE_SIZE
    return ranges, int(edges[-1])


def _read(pid: int, ranges: npt.NDArray[np.uint64], into: npt.NDArray[np.uint8]) -> int:
    """How many pages were copied before one was not there."""
    # Rows of two 64-bit numbers are what struct iovec is.
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
            f"may not read the memory of process {pid}", hint="run as root, or as its user"
        )
    raise Unreadable(f"cannot read the memory of process {pid}: {os.strerror(number)}")
