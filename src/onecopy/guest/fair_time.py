"""The time that a guest gets for something, which it may not use while it waits for processors.

On a host with more to do than it can, a guest's seconds are few: what its threads waited for the
host's processors (proc_pid_schedstat, run_delay) is not counted, or only a tenth of it.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from onecopy.linux.files import ROOT

#: Seconds between two looks, and from which on it can be told whether a guest rests.
_LOOK, _BEGINNING = 0.25, 1.0
#: The least share of time that is counted.
_LEAST = 0.1
#: Share of the time counted below which a guest waits for something else than processors.
_RESTING = 0.5


class FairTime:
    """A guest's time, beginning now."""

    def __init__(self, pid: int, seconds: float, root: Path = ROOT) -> None:
        """Give the VMM ``pid`` so many seconds."""
        self._tasks = root / f"proc/{pid}/task"
        self._left = seconds
        self._passed = 0.0
        self._at = time.monotonic()
        self._used = self._read()
        self._share = 1.0

    def pause(self) -> float:
        """Seconds, not many, to wait before the next look; 0 when the time is over."""
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
        """Whether it has other things to wait for than processors."""
        return self._passed > _BEGINNING and self._share < _RESTING

    def _read(self) -> dict[str, tuple[float, float]]:
        """(seconds run, seconds waited) of each thread; none where this kernel does not tell."""
        found = {}
        with contextlib.suppress(OSError):
            for task in self._tasks.iterdir():
                with contextlib.suppress(OSError, ValueError):
                    ran, waited, _ = (task / "schedstat").read_bytes().split()
                    found[task.name] = int(ran) / 1e9, int(waited) / 1e9
        return found
