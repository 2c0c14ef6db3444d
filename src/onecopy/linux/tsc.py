"""Measure the frequency of this processor's time-stamp counter (x86 instruction RDTSC)."""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import time
from collections.abc import Callable

#: rdtsc; shl $32, %rdx; or %rdx, %rax; ret
_READ = bytes.fromhex("0f31 48c1e220 4809d0 c3")
#: Seconds between two samples, and the attempts for each; the quickest attempt counts.
_INTERVAL, _TRIES = 0.03, 20
_NS = 1_000_000_000


@functools.cache
def megahertz() -> int | None:
    """Return the frequency in MHz; None without x86 or executable memory."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    code.write(_READ)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    began, from_ = _sample(read)
    time.sleep(_INTERVAL)
    ended, to = _sample(read)
    return round((to - from_) * _NS / (ended - began) / 1_000_000) or None


def _sample(read: Callable[[], int]) -> tuple[int, int]:
    """Sample the clock in nanoseconds and the counter at that time."""

    def once() -> tuple[int, int, int]:
        before = time.monotonic_ns()
        ticks = read()
        after = time.monotonic_ns()
        return after - before, before, ticks

    took, before, ticks = min(once() for _ in range(_TRIES))
    return before + took // 2, ticks
