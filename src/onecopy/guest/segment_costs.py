"""Checks that a guest has enough RAM for its segments.

The guest's kernel keeps a struct page in RAM for each page of a segment. Therefore a segment can be
too large for a guest that reads only part of it. Not here: the cost on the host (sharing/).
"""

from __future__ import annotations

from collections.abc import Iterable

from onecopy.errors import TooLarge
from onecopy.model import MIB, align_up, format_size
from onecopy.vmm.ram_cpu_hotplug import MEMORY_BLOCK

#: A struct page (Linux include/linux/mm_types.h) is 64 bytes, for each 4 KiB.
_PAGES = 64
#: At most this fraction (1/4) of a guest's RAM may hold them.
_SHARE = 4


def require_room(sizes: Iterable[int], memory: int) -> None:
    """Raise TooLarge unless segments of ``sizes`` bytes fit a guest with ``memory`` bytes."""
    total = sum(sizes)
    taken = total // _PAGES
    if taken * _SHARE > memory:
        needed = memory + align_up(taken * _SHARE - memory, MEMORY_BLOCK)
        raise TooLarge(
            f"segments of {format_size(total)} do not fit: the guest's kernel needs "
            f"{format_size(taken)} of RAM for their page structures; the limit is "
            f"{format_size(memory // _SHARE)} of {format_size(memory)}",
            hint=f"start the guest with --memory {needed // MIB}M or more, or make the segment "
            "smaller",
        )
