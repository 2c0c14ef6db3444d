"""Admission: refuses guests for which the host has too little memory, unless the user overcommits.

Admission counts QEMU's own memory. For a booted guest it adds the whole RAM, which the guest may
write at any time. A clone shares the saved RAM. Pages that a clone writes later are not counted,
because most clones write few. So many busy clones can still exhaust a host; `onecopy report` shows
their memory.
"""

from __future__ import annotations

import msgspec

from onecopy.errors import InsufficientResources
from onecopy.guest.lifecycle.launchplan import LaunchPlan
from onecopy.linux.counters import meminfo
from onecopy.model import MIB
from onecopy.vmm.argv import LEAST_TRANSLATED, TRANSLATED

#: Private bytes of an idle clone and its QEMU, with a margin (measured: docs/performance.md). TCG
#: also needs memory for translated code, which grows as the guest works.
_CLONE = 20 * MIB
#: Bytes for the kernel and initramfs, which QEMU keeps after a boot.
_BOOTED = 16 * MIB
#: The part of the host's memory that stays free, for the host and the page cache of shared files.
_KEPT = 0.05


class Need(msgspec.Struct, frozen=True):
    """The memory that one more guest needs, in bytes."""

    each: int
    translated: int
    """The part of ``each`` for translated code."""


def of_plan(plan: LaunchPlan, count: int = 1) -> Need:
    """Return the memory that each of ``count`` guests of a plan needs."""
    if plan.boot:
        return of_booted(plan.accel.name, plan.config.memory, count)
    added = max((plan.extra.memory or 0) - plan.config.memory, 0)
    return of_clones(plan.accel.name, count, added)


def of_clones(accel: str, count: int = 1, added: int = 0) -> Need:
    """Return the memory that each of ``count`` more clones needs.

    Under TCG each clone gets as much room for translated code as busy guests need. If the host
    lacks the memory for that, each gets less, but at least `LEAST_TRANSLATED`.

    Args:
        accel: ``kvm`` or ``tcg``.
        count: The number of clones.
        added: Bytes of RAM for each clone beyond the saved RAM.
    """
    return _of(accel, count, _CLONE + added)


def of_booted(accel: str, memory: int, count: int = 1) -> Need:
    """Return the memory that each of ``count`` booted guests with ``memory`` bytes of RAM needs."""
    return _of(accel, count, _CLONE + _BOOTED + memory)


def _of(accel: str, count: int, each: int) -> Need:
    if accel != "tcg":
        return Need(each, TRANSLATED)
    info, room = meminfo.read(), TRANSLATED
    if info.available is not None:
        room = (info.available - _kept(info)) // max(count, 1) - each
    room = min(max(room - room % MIB, LEAST_TRANSLATED), TRANSLATED)
    return Need(each + room, room)


def _kept(info: meminfo.MemInfo) -> int:
    return int((info.total or 0) * _KEPT)


def require(each: int, count: int = 1) -> None:
    """Raise InsufficientResources unless ``count`` more guests of ``each`` bytes fit the host."""
    info = meminfo.read()
    if info.available is None:
        return
    kept = _kept(info)
    needed = each * count + kept
    if needed > info.available:
        fit = max(info.available - kept, 0) // each
        raise InsufficientResources(
            "memory",
            needed=needed,
            available=info.available,
            hint=f"a guest needs {each // MIB} MiB and the host keeps {kept // MIB} MiB, so {fit} "
            "more would fit: start fewer guests, stop others, or give --overcommit",
        )
