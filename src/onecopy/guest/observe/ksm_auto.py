"""Turns KSM on and off by the host's free memory: `onecopy ksm auto`.

At the end the host's settings are restored. If the command is killed, `onecopy ksm off` restores
them (sharing/ksm_settings.py). Not here: the decision (sharing/ksm_policy.py).
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
    """Adjust KSM every ``interval`` seconds until interrupted, then restore its settings.

    Args:
        interval: Seconds between adjustments.
        below: The share of free memory below which KSM runs.
        tell: Called with one line of text for each change.
        root: The root of /proc and /sys.

    Raises:
        Incompatible: The kernel has no KSM.
        NotPermitted: This user may not change KSM's settings.
        InvalidInput: KSM is running already, or another program changed its settings.
    """
    if ksm.required("run", root) == _RUNS:
        raise InvalidInput(
            "KSM is running already, so another program may control it",
            hint="see `onecopy ksm status`; if onecopy started it, run `onecopy ksm off` first",
        )
    state, advised = State(), ksm.setting("advisor_mode", root) is not None
    try:
        while True:
            state = _step(state, below, advised, tell, root)
            time.sleep(interval)
    finally:
        left = ksm_settings.turn_off(root)
        for name in left:
            tell(f"{name} was changed by another program and is not restored")


def _step(
    state: State, below: float, advised: bool, tell: Callable[[str], None], root: Path
) -> State:
    _require_ours(state, root)
    next_state = decide(state, _look(root), below=below)
    for name, value in _settings(next_state, advised).items():
        if ksm.setting(name, root) != value:
            ksm_settings.tune({name: value}, root)
    if (next_state.runs, next_state.why) != (state.runs, state.why):
        tell(f"KSM {'runs' if next_state.runs else 'is stopped'}: {next_state.why}")
    return next_state


def _require_ours(state: State, root: Path) -> None:
    """Raise InvalidInput if another program has turned KSM on or off since the last step."""
    now = ksm.required("run", root)
    if (now == _RUNS) != state.runs:
        raise InvalidInput(
            f"another program has set KSM's run to {now}",
            hint="only one program can control KSM: end the other one, then start this again",
        )


def _settings(state: State, advised: bool) -> dict[str, str]:
    if not state.runs:
        return {"run": "0"}
    speed = {"advisor_mode": "scan-time"} if advised else {"pages_to_scan": str(state.pages)}
    return {**speed, "run": _RUNS}


def _look(root: Path) -> Look:
    memory, now = meminfo.read(root), ksm.read(root)
    if now is None or memory.total is None or memory.available is None:
        raise Incompatible("this kernel does not report KSM's counters or the host's memory")
    saved = (now.pages_sharing or 0) * PAGE_SIZE
    profit = saved if now.general_profit is None else now.general_profit
    return Look(memory.total, memory.available, profit, now.full_scans or 0)
