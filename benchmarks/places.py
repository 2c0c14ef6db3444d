"""Where the host memory of a guest from a saved system lies, by what is mapped (smaps).

Not here: what is the guest's and what the VMM's (onecopy.sharing.account).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.figures import Running
from onecopy.guest.lifecycle.launchplan import LaunchPlan
from onecopy.linux.counters import smaps


@dataclass(frozen=True, slots=True)
class Place:
    """One kind of mapping; bytes per guest, mean of all."""

    name: str
    rss: float
    pss: float
    private: float
    """Pages that no other process maps."""
    anonymous: float
    """Pages that are in no file: written here, merged ones included."""


def places(guests: Sequence[Running], saved: LaunchPlan) -> list[Place]:
    """All kinds of mappings, the largest first."""
    found: dict[str, list[smaps.Mapping]] = {}
    for guest in guests:
        for mapping in smaps.read(guest.maps.pid):
            found.setdefault(_place(mapping, saved), []).append(mapping)
    count = len(guests)
    kinds = [
        Place(
            name,
            sum(m.rss for m in mappings) / count,
            sum(m.pss for m in mappings) / count,
            sum(m.private for m in mappings) / count,
            sum(m.anonymous for m in mappings) / count,
        )
        for name, mappings in found.items()
    ]
    return sorted(kinds, key=lambda place: -place.pss)


def _place(mapping: smaps.Mapping, saved: LaunchPlan) -> str:
    path = mapping.path
    if path == str(saved.ram):
        return "guest RAM (saved file, copy-on-write)"
    if path in {str(item.layer.path) for item in saved.placed if item.layer}:
        return "segments"
    if "x" in mapping.perms and not path:
        return "translated code (TCG)"
    if path == "[heap]":
        return "heap"
    if path.startswith("/"):
        return "QEMU and its libraries, " + ("data" if "w" in mapping.perms else "code")
    if path:
        return "stack, vdso"
    return "anonymous: thread arenas and stacks, TCG tables"
