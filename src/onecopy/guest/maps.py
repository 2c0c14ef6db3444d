"""From running guests to what sharing/ needs to know of them."""

from __future__ import annotations

from collections.abc import Iterable

from onecopy.guest.folder import GuestRecord
from onecopy.sharing.account import GuestMaps


def guest_maps(guests: Iterable[GuestRecord]) -> list[GuestMaps]:
    """One GuestMaps per guest."""
    return [
        GuestMaps(
            name=guest.name,
            pid=guest.pid,
            ram_path=guest.ram_path,
            ram_bytes=guest.memory,
            segments=guest.segments,
        )
        for guest in guests
    ]
