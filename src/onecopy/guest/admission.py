"""Admission: no guest is started that the host has no memory for, unless its user wants it.

Counted is what a guest takes by being there. That is a cold guest's whole RAM, which it may write
to at any time. A clone shares what was saved; what it may write later is not counted, since most
never do. So many busy clones can still exhaust a host: what they take is in `onecopy report`.
"""

from __future__ import annotations

from onecopy.errors import NotEnough
from onecopy.host import meminfo
from onecopy.model import MIB

#: Bytes of a resting clone that nobody shares, QEMU's included, and some more (docs/performance.md
#: has what was measured). TCG keeps its translation of the guest's code.
_CLONE = {"kvm": 20 * MIB, "tcg": 40 * MIB}
#: The part of the host's memory that stays free, for itself and the page cache of what is shared.
_KEPT = 0.05


def of_clone(accel: str, added: int = 0) -> int:
    """Bytes that one more clone needs under ``kvm`` or ``tcg``, with ``added`` bytes of RAM.

    The latter are as those of a cold guest.
    """
    return _CLONE[accel] + added


def of_cold(accel: str, memory: int) -> int:
    """Bytes that one more cold guest with ``memory`` bytes of RAM needs."""
    return memory + _CLONE[accel]


def require(each: int, count: int = 1) -> None:
    """Raise NotEnough unless the host has memory for ``count`` more guests of ``each`` bytes."""
    info = meminfo.read()
    if info.available is None:
        return
    kept = int((info.total or 0) * _KEPT)
    needed = each * count + kept
    if needed > info.available:
        fit = max(info.available - kept, 0) // each
        raise NotEnough(
            "memory",
            needed=needed,
            available=info.available,
            hint=f"a guest takes {each // MIB} MiB, and {kept // MIB} MiB are left to the host, so "
            f"{fit} would fit: start fewer, stop others, or give --overcommit",
        )
