"""/proc/kpagecount and /proc/kpageflags: what the kernel knows about a page frame.

Both are documented in Documentation/admin-guide/mm/pagemap.rst, both need root. Not here: which
frame a process's page is in (``pagemap``).
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
    """The bits of one kpageflags entry (include/uapi/linux/kernel-page-flags.h)."""

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
    """How many times each frame is mapped. Raises NotPermitted, Incompatible, InvalidInput."""
    return _entries(pfns, root / "proc/kpagecount")


def flags(pfns: Iterable[int], root: Path = ROOT) -> list[Flags]:
    """The flags of each frame. Raises NotPermitted, Incompatible, InvalidInput."""
    return [Flags(entry) for entry in _entries(pfns, root / "proc/kpageflags")]


def _entries(pfns: Iterable[int], path: Path) -> list[int]:
    try:
        with path.open("rb", buffering=0) as file:
            return [_entry(file.fileno(), pfn) for pfn in pfns]
    except PermissionError as error:
        raise not_permitted(path) from error
    except FileNotFoundError as error:
        raise Incompatible(
            f"this kernel has no {path}", hint="it was built without CONFIG_PROC_PAGE_MONITOR"
        ) from error


def _entry(fd: int, pfn: int) -> int:
    data = os.pread(fd, _ENTRY, pfn * _ENTRY)
    if len(data) != _ENTRY:
        raise InvalidInput(f"there is no page frame {pfn:#x}")
    return int.from_bytes(data, "little")
