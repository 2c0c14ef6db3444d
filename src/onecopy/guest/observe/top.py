"""Samples all guests of a host repeatedly, for `onecopy top`.

Not every sample reads everything. The list of guests is read when the run directory has changed.
Other QEMU processes and the files' resident pages are read with every tenth sample. Not here: the
figures of one guest (sharing/live_figures.py).
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import msgspec

from onecopy.errors import InvalidInput, NotFound, NotPermitted
from onecopy.guest.observe.accounts import guest_maps, vmm_maps
from onecopy.guest.runtime import Runtime
from onecopy.linux import process
from onecopy.linux.counters import ksm, meminfo, residency
from onecopy.model import PAGE_SIZE, format_size
from onecopy.sharing.live_figures import Row, Sample, rows, sample
from onecopy.vmm import external_qemu

#: A full sample is taken once in this many.
_SELDOM = 10


class View(msgspec.Struct, frozen=True):
    """A sample of a host; sizes are bytes, None is unknown."""

    rows: list[Row]
    cpu: float
    """CPU use of all guests together; 1.0 is one CPU."""
    total: int
    available: int
    merging: str
    """One line about KSM."""
    files: list[tuple[str, int | None, int | None, int]]
    """Files that guests map: name, size, resident bytes, number of guests."""


class Watch:
    """A sampler of a host; its first sample has no CPU figures."""

    def __init__(self, host: Runtime) -> None:
        self._host = host
        self._looks = 0
        self._folder_changed = -1
        self._guests: list[tuple[str, int]] = []
        self._users: Counter[tuple[str, str]] = Counter()
        self._files: list[tuple[str, int | None, int | None, int]] = []
        self._before: tuple[float, list[Sample], float] = (0.0, [], 0.0)
        self._ksmd = ksm.thread()

    def look(self) -> View:
        """Take a sample."""
        seldom = self._looks % _SELDOM == 0
        self._looks += 1
        self._find(seldom)
        memory, merging = meminfo.read(), ksm.read()
        now, samples = time.monotonic(), sample(self._guests, merging=_merges(merging))
        daemon = self._ksmd_seconds()
        then, before, daemon_before = self._before
        self._before = now, samples, daemon
        found = rows(samples, before, now - then)
        share = (daemon - daemon_before) / (now - then) if before else 0.0
        return View(
            rows=found,
            cpu=sum(row.cpu or 0.0 for row in found),
            total=memory.total or 0,
            available=memory.available or 0,
            merging=_ksm_line(merging, share),
            files=self._files,
        )

    def _find(self, seldom: bool) -> None:
        changed = self._host.run.stat().st_mtime_ns if self._host.run.is_dir() else 0
        if changed == self._folder_changed and not seldom:
            return
        self._folder_changed = changed
        maps = guest_maps([*self._host.guests(), *self._host.prepared()])
        others = map(vmm_maps, external_qemu.find({each.pid for each in maps}).vmms)
        self._guests = [(each.name, each.pid) for each in [*maps, *others]]
        users: Counter[tuple[str, str]] = Counter()
        for each in maps:
            users.update((name, each.file(path)) for path, name in each.segments.items())
            if each.ram_path:
                users["RAM of saved systems", each.ram_path] += 1
        self._files = [
            (name, *_sizes(Path(path)), number) for (name, path), number in sorted(users.items())
        ]

    def _ksmd_seconds(self) -> float:
        with suppress(NotFound):
            return process.cpu_seconds(self._ksmd) if self._ksmd else 0.0
        return 0.0


def _sizes(path: Path) -> tuple[int | None, int | None]:
    with suppress(OSError, NotFound, NotPermitted, InvalidInput):
        return path.stat().st_size, residency.resident_bytes(path)
    return None, None


def _merges(merging: ksm.Ksm | None) -> bool:
    """Return whether merged pages can exist; otherwise they need no read for each process."""
    return merging is not None and bool(merging.run or merging.pages_shared)


def _ksm_line(merging: ksm.Ksm | None, cpu: float) -> str:
    if merging is None or merging.run is None:
        return "KSM: this kernel has no KSM"
    state = {0: "stopped", 1: "runs", 2: "stopped, all pages unmerged"}.get(merging.run, "?")
    saved = (merging.pages_sharing or 0) * PAGE_SIZE
    profit = "?" if merging.general_profit is None else format_size(merging.general_profit)
    verb = "saves" if merging.run else "still saves"
    return f"KSM {state}, {verb} {format_size(saved)}, profit {profit}, CPU {cpu * 100:.1f}%"
