"""Admission: no guest is started that the host has no memory for, unless its user wants it.

Counted is what QEMU may take, and of a cold guest its whole RAM, which it may write to at any time.
A clone shares what was saved; what it may write later is not counted, since most never do. So many
busy clones can still exhaust a host: what they take is in `onecopy report`.
"""

from __future__ import annotations

import msgspec

from onecopy.errors import InsufficientResources
from onecopy.guest.lifecycle.launchplan import LaunchPlan
from onecopy.linux.counters import meminfo
from onecopy.model import MIB
from onecopy.vmm.argv import LEAST_TRANSLATED, TRANSLATED

#: Bytes of a resting clone that nobody shares, QEMU's included, and some more (docs/performance.md
#: has what was measured). TCG has its translation of the guest's code besides, which work fills.
_CLONE = 20 * MIB
#: Besides that QEMU keeps the kernel and initramfs that it has booted.
_BOOTED = 16 * MIB
#: The part of the host's memory that stays free, for itself and the page cache of what is shared.
_KEPT = 0.05


class Need(msgspec.Struct, frozen=True):
    """What one more guest of some needs; in bytes."""

    each: int
    translated: int
    """Of that: room for translated code."""


def of_plan(plan: LaunchPlan, count: int = 1) -> Need:
    """What each of ``count`` guests of a plan needs."""
    if plan.boot:
        return of_cold(plan.accel.name, plan.config.memory, count)
    return of_clones(plan.accel.name, count, plan.added_memory)


def of_clones(accel: str, count: int = 1, added: int = 0) -> Need:
    """What each of ``count`` more clones needs under ``kvm`` or ``tcg``, with ``added`` RAM.

    Under TCG they get as much room for translated code as work needs, and less, down to what they
    are started with at least, if the host has not the memory for all of them.
    """
    return _of(accel, count, _CLONE + added)


def of_cold(accel: str, memory: int, count: int = 1) -> Need:
    """The same of cold guests with ``memory`` bytes of RAM."""
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
            hint=f"a guest takes {each // MIB} MiB, and {kept // MIB} MiB are left to the host, so "
            f"{fit} would fit: start fewer, stop others, or give --overcommit",
        )
