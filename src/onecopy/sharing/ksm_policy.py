"""Decide when KSM should run: while memory is scarce and merging gains something.

This follows ksmtuned(8). KSM runs while less than a share of the memory is available. It scans
faster while that lasts and more slowly afterwards, or at the speed that the kernel's advisor sets.
In addition it pauses while full scans bring no profit, longer each time.

The functions are pure.

Not here: applying the decisions (guest/observe/ksm_auto.py).

Source:
    ksmtuned(8), Linux Documentation/admin-guide/mm/ksm.rst.
"""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from onecopy.model import MIB

#: Values of ksmtuned: the minimum and maximum of pages to scan, and the changes per check.
_MIN_PAGES, _MAX_PAGES, _BOOST, _DECAY = 64, 1250, 300, -50
#: Bytes of additional profit that justify two full scans.
_GAIN = 4 * MIB
#: The length of a pause in checks; it doubles each time, up to the second value.
_FIRST_REST, _LONGEST_REST = 2, 32


class Look(msgspec.Struct, frozen=True):
    """The host at one moment; bytes."""

    total: int
    available: int
    profit: int
    """The memory saved, minus KSM's own records."""
    full_scans: int


class State(msgspec.Struct, frozen=True):
    """The last decision, and what the next one needs."""

    runs: bool = False
    pages: int = _MIN_PAGES
    """Pages to scan before each sleep, if there is no advisor."""
    rest: int = 0
    """Checks for which it still pauses."""
    rests: int = _FIRST_REST
    """The length of the next pause."""
    profit: int = 0
    scans: int = 0
    """Full scans and the profit (the least since) when KSM last gained something, or started."""
    why: str = "no check yet"


def decide(state: State, look: Look, *, below: float) -> State:
    """Decide what to do now.

    Args:
        below: the share of available memory below which KSM may run.
    """
    scarce = look.available < below * look.total
    share = f"{look.available / look.total:.0%} of memory is available" if look.total else "?"
    if not scarce and not state.runs:
        return replace(State(pages=state.pages), why=f"{share}: not scarce")
    if not scarce:
        pages = state.pages + _DECAY
        if pages <= _MIN_PAGES:
            return replace(State(), why=f"{share}: no longer scarce")
        return replace(state, pages=pages, why=f"{share}: no longer scarce, so KSM slows down")
    if state.rest:
        return replace(
            state, rest=state.rest - 1, why=f"{share}, but KSM gains nothing, so it pauses"
        )
    if not state.runs:
        began = replace(state, runs=True, profit=look.profit, scans=look.full_scans)
        return replace(began, why=f"{share}: scarce")
    return _decide_running(state, look, share)


def _decide_running(state: State, look: Look, share: str) -> State:
    pages = min(state.pages + _BOOST, _MAX_PAGES)
    # The first scan after a stop corrects counts of pages that ended meanwhile.
    state = replace(state, profit=min(state.profit, look.profit))
    if look.profit >= state.profit + _GAIN:
        gained = replace(state, pages=pages, profit=look.profit, scans=look.full_scans)
        return replace(gained, rests=_FIRST_REST, why=f"{share}, and KSM gains memory")
    if look.full_scans < state.scans + 2:
        return replace(state, pages=pages, why=f"{share}: KSM keeps scanning")
    rests = min(state.rests * 2, _LONGEST_REST)
    return replace(
        state,
        runs=False,
        rest=state.rests - 1,
        rests=rests,
        why="two full scans brought no profit, so KSM pauses",
    )
