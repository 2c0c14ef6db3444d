"""What its segments cost a guest: Linux describes each of their pages in RAM of the guest's own.

So a segment can be too large for a guest that would never read most of it. Not here: what they cost
the host (sharing/).
"""

from __future__ import annotations

from collections.abc import Iterable

from onecopy.errors import TooLarge
from onecopy.model import MIB, align_up, format_size
from onecopy.vmm.ram_cpu_hotplug import MEMORY_BLOCK

#: A struct page (Linux include/linux/mm_types.h) is 64 bytes, for each 4 KiB.
_PAGES = 64
#: The part of a guest's RAM that may go there: it needs the rest for itself.
_SHARE = 4


def require_room(sizes: Iterable[int], memory: int) -> None:
    """Raise TooLarge unless a guest with ``memory`` bytes of RAM can have segments of ``sizes``."""
    total = sum(sizes)
    taken = total // _PAGES
    if taken * _SHARE > memory:
        needed = memory + align_up(taken * _SHARE - memory, MEMORY_BLOCK)
        raise TooLarge(
            f"segments of {format_size(total)} do not fit: Linux takes {format_size(taken)} of the "
            f"guest's RAM to describe their pages, and of {format_size(memory)} it can have "
            f"{format_size(memory // _SHARE)}",
            hint=f"start the guest with --memory {needed // MIB}M or more, or make the segment "
            "smaller",
        )
