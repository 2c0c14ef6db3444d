"""/proc/PID/pagemap: the location of each page of a process.

``read`` returns one 64-bit entry per page. The other functions decode an entry.

Not here: the kernel's data on a page frame (``kpage``).

Source:
    Linux Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

from array import array
from pathlib import Path

from onecopy.errors import InvalidInput, NotPermitted, Unreadable
from onecopy.linux.files import ROOT, process_directory, read_range, translating_errors
from onecopy.model import PAGE_SIZE

_PFN = (1 << 55) - 1
_SOFT_DIRTY = 1 << 55
_FILE_OR_SHARED = 1 << 61
_SWAPPED = 1 << 62
_PRESENT = 1 << 63
_ENTRY = 8
#: The largest request in pages, for a result of 4 GiB.
_LARGEST = 1 << 29


def read(pid: int, start: int, pages: int, root: Path = ROOT) -> array[int]:
    """Read the entries of ``pages`` pages.

    Args:
        start: the address of the first page in bytes, page-aligned.

    Returns:
        One entry per page; fewer where the address space ends.

    Raises:
        InvalidInput: the address or count is not valid.
        NotFound: the process has ended.
        NotPermitted: this user may not trace the process.
        Unreadable: the range exceeds 2 TiB.
    """
    if start % PAGE_SIZE or start < 0 or pages < 0:
        raise InvalidInput(f"{start:#x} is not a page address or {pages} is not a page count")
    if pages > _LARGEST:
        # A process can map more than any host has without touching it.
        raise Unreadable(
            f"process {pid} has a mapping of {pages * PAGE_SIZE >> 40} TiB; the limit is 2 TiB"
        )
    path = process_directory(pid, root) / "pagemap"
    with translating_errors(pid, path):
        data = read_range(path, start // PAGE_SIZE * _ENTRY, pages * _ENTRY)
    return array("Q", data[: len(data) // _ENTRY * _ENTRY])


def present(entry: int) -> bool:
    """Whether the page is in memory."""
    return bool(entry & _PRESENT)


def swapped(entry: int) -> bool:
    """Whether the page is in swap."""
    return bool(entry & _SWAPPED)


def file_or_shared(entry: int) -> bool:
    """Whether the page belongs to a file or shared anonymous memory, and is not a private copy."""
    return bool(entry & _FILE_OR_SHARED)


def soft_dirty(entry: int) -> bool:
    """Whether the page was written since its soft-dirty bit was cleared.

    It is always False on a kernel without CONFIG_MEM_SOFT_DIRTY.

    Source:
        Linux Documentation/admin-guide/mm/soft-dirty.rst.
    """
    return bool(entry & _SOFT_DIRTY)


def pfn(entry: int) -> int | None:
    """Return the page frame number; None if the page is not in memory.

    Raises:
        NotPermitted: the kernel shows 0, because CAP_SYS_ADMIN is missing.
    """
    if not present(entry):
        return None
    number = entry & _PFN
    if not number:
        raise NotPermitted(
            "the kernel hides page frame numbers from this user", hint="run the command as root"
        )
    return number
