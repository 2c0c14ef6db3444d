"""`onecopy ksm auto`: looks at the host now and then, and lets KSM run or rest.

The host's settings are put back at the end, or by `onecopy ksm off` if it was killed
(sharing/ksm_settings.py). Not here: what is decided (sharing/ksm_policy.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from onecopy.errors import Incompatible, InvalidInput
from onecopy.linux import files
from onecopy.linux.counters import ksm, meminfo
from onecopy.model import PAGE_SIZE
from onecopy.sharing import ksm_settings
from onecopy.sharing.ksm_policy import Look, State, decide

_RUNS = "1"


def run(
    interval: float, below: float, tell: Callable[[str], None], root: Path = files.ROOT
) -> None:
    """Look every ``interval`` seconds until it is interrupted; then all is as it was found.

    Raises Incompatible on a kernel without KSM, NotPermitted, and InvalidInput when KSM runs
    already: somebody else uses it.
    """
    if ksm.required("run", root) == _RUNS:
        raise InvalidInput(
            "KSM runs already: somebody else looks after it",
            hint="`onecopy ksm status` shows it; if that was onecopy, `onecopy ksm off` first",
        )
    state, advised = State(), ksm.setting("advisor_mode", root) is not None
    try:
        while True:
            state = _step(state, below, advised, tell, root)
            time.sleep(interval)
    finally:
        left = ksm_settings.turn_off(root)
        for name in left:
            tell(f"{name} was changed by somebody else, and is left")


def _step(
    state: State, below: float, advised: bool, tell: Callable[[str], None], root: Path
) -> State:
    _require_ours(state, root)
    next_state = decide(state, _look(root), below=below)
    for name, value in _settings(next_state, advised).items():
        if ksm.setting(name, root) != value:
            ksm_settings.tune({name: value}, root)
    if (next_state.runs, next_state.why) != (state.runs, state.why):
        tell(f"KSM {'runs' if next_state.runs else 'stands'}: {next_state.why}")
    return next_state


def _require_ours(state: State, root: Path) -> None:
    """Raise InvalidInput if somebody else has stopped KSM, or let it run, since the last look."""
    now = ksm.required("run", root)
    if (now == _RUNS) != state.runs:
        raise InvalidInput(
            f"somebody else has set KSM's run to {now} meanwhile",
            hint="only one can look after it: end the other, and start this again",
        )


def _settings(state: State, advised: bool) -> dict[str, str]:
    if not state.runs:
        return {"run": "0"}
    speed = {"advisor_mode": "scan-time"} if advised else {"pages_to_scan": str(state.pages)}
    return {**speed, "run": _RUNS}


def _look(root: Path) -> Look:
    memory, now = meminfo.read(root), ksm.read(root)
    if now is None or memory.total is None or memory.available is None:
        raise Incompatible("this kernel does not tell what KSM does, or how much memory there is")
    saved = (now.pages_sharing or 0) * PAGE_SIZE
    profit = saved if now.general_profit is None else now.general_profit
    return Look(memory.total, memory.available, profit, now.full_scans or 0)
