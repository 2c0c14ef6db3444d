"""When KSM should run: while memory is scarce, and while it gains something.

What ksmtuned(8) does: KSM runs while less memory is available than a share of all; it looks faster
at memory as long as that lasts and more slowly afterwards, or as fast as the kernel's advisor lets
it (Documentation/admin-guide/mm/ksm.rst). Beyond that it rests while whole scans bring no profit,
each time longer. Pure: figures go in, decisions come out. Not here: who carries them out
(guest/observe/ksm_auto.py).
"""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from onecopy.model import MIB

#: ksmtuned's: pages to scan at least and at most, and their change from look to look.
_LEAST, _MOST, _BOOST, _DECAY = 64, 1250, 300, -50
#: So much more profit makes two whole scans worth it.
_GAIN = 4 * MIB
#: Looks that a rest lasts: twice as many each time, up to these.
_FIRST_REST, _LONGEST_REST = 2, 32


class Look(msgspec.Struct, frozen=True):
    """The host at one moment; bytes."""

    total: int
    available: int
    profit: int
    """What KSM saves, less its own records."""
    full_scans: int


class State(msgspec.Struct, frozen=True):
    """What was decided, and what the next decision needs."""

    runs: bool = False
    pages: int = _LEAST
    """To scan before each sleep, where there is no advisor."""
    rest: int = 0
    """Looks for which it still rests."""
    rests: int = _FIRST_REST
    """How long the next rest is."""
    profit: int = 0
    scans: int = 0
    """Profit, the least since, and whole scans when it last gained something, or began."""
    why: str = "it has not looked yet"


def decide(state: State, look: Look, *, below: float) -> State:
    """What to do now. KSM may run while available memory is less than ``below`` of all."""
    scarce = look.available < below * look.total
    share = f"{look.available / look.total:.0%} of memory is available" if look.total else "?"
    if not scarce and not state.runs:
        return replace(State(pages=state.pages), why=f"{share}: not scarce")
    if not scarce:
        pages = state.pages + _DECAY
        if pages <= _LEAST:
            return replace(State(), why=f"{share}: not scarce any more")
        return replace(state, pages=pages, why=f"{share}: not scarce any more, slower")
    if state.rest:
        return replace(state, rest=state.rest - 1, why=f"{share}, but it gains nothing: rests")
    if not state.runs:
        began = replace(state, runs=True, profit=look.profit, scans=look.full_scans)
        return replace(began, why=f"{share}: scarce")
    return _running(state, look, share)


def _running(state: State, look: Look, share: str) -> State:
    pages = min(state.pages + _BOOST, _MOST)
    # Its first scan takes out of its counts what has ended while it stood.
    state = replace(state, profit=min(state.profit, look.profit))
    if look.profit >= state.profit + _GAIN:
        gained = replace(state, pages=pages, profit=look.profit, scans=look.full_scans)
        return replace(gained, rests=_FIRST_REST, why=f"{share}, and it gains")
    if look.full_scans < state.scans + 2:
        return replace(state, pages=pages, why=f"{share}: it looks on")
    rests = min(state.rests * 2, _LONGEST_REST)
    return replace(
        state,
        runs=False,
        rest=state.rests - 1,
        rests=rests,
        why="two whole scans brought no profit: rests",
    )
