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
            ram_added=guest.added,
            segments={
                device.path: f"{item.name}.{number}" if number else item.name
                for item in guest.attached
                for number, device in enumerate(item.devices)
            },
            files={
                device.path: device.file
                for item in guest.attached
                for device in item.devices
                if device.file
            },
        )
        for guest in guests
    ]
