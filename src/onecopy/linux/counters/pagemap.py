"""/proc/PID/pagemap: where each page of a process is. Documentation/admin-guide/mm/pagemap.rst.

``read`` gives one 64-bit entry per page; the other functions say what stands in one entry. Not
here: what the kernel knows about a page frame (``kpage``).
"""

from __future__ import annotations

from array import array
from pathlib import Path

from onecopy.errors import InvalidInput, NotPermitted, Unreadable
from onecopy.linux.files import ROOT, asking, process_folder, read_range
from onecopy.model import PAGE_SIZE

_PFN = (1 << 55) - 1
_SOFT_DIRTY = 1 << 55
_FILE_OR_SHARED = 1 << 61
_SWAPPED = 1 << 62
_PRESENT = 1 << 63
_ENTRY = 8
#: Pages at once: a table of 4 GiB.
_MOST = 1 << 29


def read(pid: int, start: int, pages: int, root: Path = ROOT) -> array[int]:
    """The entries of ``pages`` pages from address ``start`` (bytes, page-aligned) on.

    Fewer come back where the address space ends. Raises InvalidInput, NotFound when the process
    is gone, NotPermitted without ptrace rights over it, Unreadable of more than 2 TiB.
    """
    if start % PAGE_SIZE or start < 0 or pages < 0:
        raise InvalidInput(f"{start:#x} is not a page's address, or {pages} not a count of pages")
    if pages > _MOST:
        # A process can map more than any host has, and none of it be there.
        raise Unreadable(f"process {pid} maps {pages * PAGE_SIZE >> 40} TiB at one place")
    path = process_folder(pid, root) / "pagemap"
    with asking(pid, path):
        data = read_range(path, start // PAGE_SIZE * _ENTRY, pages * _ENTRY)
    return array("Q", data[: len(data) // _ENTRY * _ENTRY])


def present(entry: int) -> bool:
    """The page is in memory."""
    return bool(entry & _PRESENT)


def swapped(entry: int) -> bool:
    """The page is in swap."""
    return bool(entry & _SWAPPED)


def file_or_shared(entry: int) -> bool:
    """The page is a file's or shared anonymous memory, not a private copy."""
    return bool(entry & _FILE_OR_SHARED)


def soft_dirty(entry: int) -> bool:
    """The page was written since its soft-dirty bit was cleared.

    Always False on a kernel without CONFIG_MEM_SOFT_DIRTY (mm/soft-dirty.rst).
    """
    return bool(entry & _SOFT_DIRTY)


def pfn(entry: int) -> int | None:
    """The page frame number; None when the page is not in memory.

    Raises NotPermitted when the kernel hides it: it shows 0 without CAP_SYS_ADMIN.
    """
    if not present(entry):
        return None
    number = entry & _PFN
    if not number:
        raise NotPermitted("the kernel hides page frame numbers", hint="run as root")
    return number
