"""/proc/kpagecount and /proc/kpageflags: the kernel's data on one page frame.

Both need root.

Not here: the frame of a process's page (``pagemap``).

Source:
    Linux Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from enum import IntFlag
from pathlib import Path

from onecopy.errors import Incompatible, InvalidInput
from onecopy.linux.files import ROOT, not_permitted

_ENTRY = 8


class Flags(IntFlag):
    """The bits of a kpageflags entry (include/uapi/linux/kernel-page-flags.h)."""

    LOCKED = 1 << 0
    ERROR = 1 << 1
    REFERENCED = 1 << 2
    UPTODATE = 1 << 3
    DIRTY = 1 << 4
    LRU = 1 << 5
    ACTIVE = 1 << 6
    SLAB = 1 << 7
    WRITEBACK = 1 << 8
    RECLAIM = 1 << 9
    BUDDY = 1 << 10
    MMAP = 1 << 11
    ANON = 1 << 12
    SWAPCACHE = 1 << 13
    SWAPBACKED = 1 << 14
    COMPOUND_HEAD = 1 << 15
    COMPOUND_TAIL = 1 << 16
    HUGE = 1 << 17
    UNEVICTABLE = 1 << 18
    HWPOISON = 1 << 19
    NOPAGE = 1 << 20
    KSM = 1 << 21
    THP = 1 << 22
    OFFLINE = 1 << 23
    ZERO_PAGE = 1 << 24
    IDLE = 1 << 25
    PGTABLE = 1 << 26


def counts(pfns: Iterable[int], root: Path = ROOT) -> list[int]:
    """Return how many times each frame is mapped.

    Raises:
        NotPermitted: only root may read the counts.
        Incompatible: this kernel does not have them.
        InvalidInput: there is no such frame.
    """
    return _entries(pfns, root / "proc/kpagecount")


def flags(pfns: Iterable[int], root: Path = ROOT) -> list[Flags]:
    """Return the flags of each frame.

    Raises:
        NotPermitted: only root may read the flags.
        Incompatible: this kernel does not have them.
        InvalidInput: there is no such frame.
    """
    return [Flags(entry) for entry in _entries(pfns, root / "proc/kpageflags")]


def _entries(pfns: Iterable[int], path: Path) -> list[int]:
    try:
        with path.open("rb", buffering=0) as file:
            return [_entry(file.fileno(), pfn) for pfn in pfns]
    except PermissionError as error:
        raise not_permitted(path) from error
    except FileNotFoundError as error:
        raise Incompatible(
            f"this kernel has no {path}",
            hint="onecopy needs a kernel with CONFIG_PROC_PAGE_MONITOR",
        ) from error


def _entry(fd: int, pfn: int) -> int:
    data = os.pread(fd, _ENTRY, pfn * _ENTRY)
    if len(data) != _ENTRY:
        raise InvalidInput(f"the host has no page frame {pfn:#x}")
    return int.from_bytes(data, "little")
