"""A time limit for a guest that does not count the time in which it waits for host processors.

On an overloaded host a guest's threads wait long to be scheduled. The limit excludes that time
(run_delay), but counts at least a tenth of the time that passes.

Source: Linux Documentation/scheduler/sched-stats.rst, /proc/PID/schedstat.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from onecopy.linux.files import ROOT

#: Seconds between two samples, and before the first decision whether a guest is idle.
_LOOK, _BEGINNING = 0.25, 1.0
#: The smallest share of elapsed time that counts.
_LEAST = 0.1
#: A guest that runs for less than this share of its time is idle.
_RESTING = 0.5


class FairTime:
    """A guest's time limit, which starts now."""

    def __init__(self, pid: int, seconds: float, root: Path = ROOT) -> None:
        """Start a limit of ``seconds`` for the VMM ``pid``."""
        self._tasks = root / f"proc/{pid}/task"
        self._left = seconds
        self._passed = 0.0
        self._at = time.monotonic()
        self._used = self._read()
        self._share = 1.0

    def pause(self) -> float:
        """Take a sample; return the seconds until the next one, 0 when the time has expired."""
        now, used = time.monotonic(), self._read()
        wall = now - self._at
        old = [(thread, before) for thread, before in self._used.items() if thread in used]
        waited = max((used[thread][1] - before[1] for thread, before in old), default=0.0)
        ran = max((used[thread][0] - before[0] for thread, before in old), default=0.0)
        counted = max(wall - waited, wall * _LEAST)
        if wall >= _LOOK / 2:
            self._share = ran / counted
        self._at, self._used = now, used
        self._passed += counted
        self._left -= counted
        return max(min(self._left, _LOOK), 0.0)

    def rests(self) -> bool:
        """Return whether the guest is idle: it waits, but not for processors."""
        return self._passed > _BEGINNING and self._share < _RESTING

    def _read(self) -> dict[str, tuple[float, float]]:
        """Return (seconds run, seconds waited) of each thread; none without kernel support."""
        found = {}
        with contextlib.suppress(OSError):
            for task in self._tasks.iterdir():
                with contextlib.suppress(OSError, ValueError):
                    ran, waited, _ = (task / "schedstat").read_bytes().split()
                    found[task.name] = int(ran) / 1e9, int(waited) / 1e9
        return found
