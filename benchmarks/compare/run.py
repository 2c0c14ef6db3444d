"""Measures one way: starts guests one after another, loads them, and ends them.

Not here: the ways (ways.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import median

from benchmarks.compare.mix import Tell, Ware, shell
from benchmarks.compare.templating import Templates
from benchmarks.compare.ways import Means, Up, Way, start_one
from benchmarks.counts import Counts, medians
from benchmarks.figures import SETTLE, Spread, cpu, evict, settled, taken
from benchmarks.merging import SETTINGS, converged
from benchmarks.plain import disk_module
from onecopy.linux import process
from onecopy.linux.counters import ksm, meminfo, smaps

#: Seconds between two samples of the host's memory.
_EVERY = 0.5
#: A program that no guest has run yet, so none has its pages in memory.
_PROGRAM = "python3 -c 'import sqlite3, ssl, unittest'"
#: Guests of each application to load, one after another.
_WORKERS = 2


@dataclass(slots=True)
class Timeline:
    """The host's memory while guests start and work."""

    began: float
    seconds: list[float] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    """Growth of the host's used memory in bytes, page cache included."""
    marks: dict[str, float] = field(default_factory=dict)
    """Step -> seconds at which it was done."""

    def mark(self, what: str, tell: Tell) -> None:
        """Record and report that ``what`` is done."""
        self.marks[what] = time.monotonic() - self.began
        tell(f"{what} after {self.marks[what]:.0f} s")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The figures of a way; seconds and bytes."""

    way: str
    guests: int
    alike: bool
    """Whether the guests share one root; otherwise each has its own."""
    first: float
    """Seconds until the first guest's application answered, with an empty page cache."""
    seconds: Spread
    """The same for the other guests."""
    boot_cpu: float
    """Median CPU seconds of a VMM until its application answered."""
    boot_counts: Counts
    """The counts of a VMM until its application answered."""
    counts: Counts
    """The same at the end, after some guests have worked."""
    idle_memory: int
    """Host memory of all idle guests, after KSM has merged all that it can."""
    pss: int
    """Pss of all VMMs at that time, without cached files that no VMM maps."""
    worked: int
    """Host memory at the end, after some guests have worked."""
    peak: int
    idle: float
    """CPU seconds per second of an idle guest, without ksmd."""
    vmm_cpu: float
    """CPU seconds of all VMMs from their start to the end."""
    ksm_cpu: float
    """CPU seconds of ksmd over the same time."""
    program: dict[str, float]
    """Application -> median seconds of a program's first start in such a guest."""
    load: dict[str, float]
    """Application -> median answers per second inside a guest."""
    timeline: Timeline


async def measure(
    way: Way, count: int, wares: Sequence[Ware], templates: Templates, tell: Tell
) -> Outcome:
    """Run ``count`` guests with all applications in turn, and end them."""
    if way.name == "template":
        for ware in wares:
            await templates.of(ware)
    for ware in wares:
        disk_module(ware.setup)
    evict(_files(wares, templates))
    at_first = meminfo.read()
    # The sampler must end before the guests.
    async with contextlib.AsyncExitStack() as ends, _watched(at_first) as timeline:
        merging = ends.enter_context(_ksm(on=way.ksm))
        means = Means(ends, templates)
        guests = []
        for number, ware in enumerate(islice(cycle(wares), count), start=1):
            guests.append(await start_one(way, ware, means))
            tell(f"{number} of {count} answers")
        timeline.mark("all answer", tell)
        if way.ksm:
            await converged()
        pids = [guest.pid for guest in guests]
        idle = await settled(pids)
        idle_memory, pss = _used(at_first), _pss(pids)
        timeline.mark("idle", tell)
        program = await _of_each(guests, _start_program)
        timeline.mark("program started", tell)
        load = await _of_each(guests, _work)
        timeline.mark("worked", tell)
        await asyncio.sleep(SETTLE)
        return Outcome(
            way=way.name,
            guests=count,
            alike=len(wares) < count,
            first=guests[0].seconds,
            seconds=Spread.of(guest.seconds for guest in guests[1:]),
            boot_cpu=Spread.of(guest.cpu for guest in guests).median,
            boot_counts=medians([guest.counts for guest in guests]),
            counts=medians([Counts.of(pid) for pid in pids]),
            idle_memory=idle_memory,
            pss=pss,
            worked=_used(at_first),
            peak=max(timeline.used),
            idle=idle,
            vmm_cpu=cpu(pids),
            ksm_cpu=merging(),
            program=program,
            load=load,
            timeline=timeline,
        )


def _files(wares: Sequence[Ware], templates: Templates) -> list[Path]:
    """Return all files that guests map or read, so that each way starts with none in memory."""
    files = templates.files()
    for ware in wares:
        files += [ware.setup.image, ware.setup.saved.ram]
        files += [item.layer.path for item in ware.setup.prepared.placed if item.layer]
    return files


def _used(before: meminfo.MemInfo) -> int:
    return taken(before.unused, meminfo.read().unused)


def _pss(pids: Sequence[int]) -> int:
    return sum(mapping.pss for pid in pids for mapping in smaps.read(pid))


@contextlib.contextmanager
def _ksm(*, on: bool) -> Iterator[Callable[[], float]]:
    """Turn KSM on or off, and restore it; yield a function that returns ksmd's CPU seconds."""
    thread = ksm.thread()
    began = process.cpu_seconds(thread) if thread else 0.0

    def spent() -> float:
        return process.cpu_seconds(thread) - began if thread else 0.0

    with ksm.settings({**ksm.thorough(), **SETTINGS} if on else {}):
        yield spent


@contextlib.asynccontextmanager
async def _watched(before: meminfo.MemInfo) -> AsyncIterator[Timeline]:
    timeline = Timeline(time.monotonic())

    async def look() -> None:
        while True:
            timeline.seconds.append(time.monotonic() - timeline.began)
            timeline.used.append(_used(before))
            await asyncio.sleep(_EVERY)

    looking = asyncio.create_task(look())
    try:
        yield timeline
    finally:
        looking.cancel()


async def _of_each(guests: Sequence[Up], measured: Callable[[Up], float]) -> dict[str, float]:
    """Measure some guests of each application, one after another; return the medians."""
    found: dict[str, list[float]] = {}
    for guest in guests:
        values = found.setdefault(guest.ware.application.name, [])
        if len(values) < _WORKERS:
            values.append(await asyncio.to_thread(measured, guest))
    return {name: median(values) for name, values in found.items()}


def _start_program(guest: Up) -> float:
    began = time.monotonic()
    said = shell(guest.shell, f"{_PROGRAM} && echo done")
    if said.strip() != "done":
        raise RuntimeError(f"the program did not run: {said!r}")
    return time.monotonic() - began


def _work(guest: Up) -> float:
    return float(shell(guest.shell, guest.ware.application.load))
