"""Measures work under TCG with less and less memory for translated code.

It takes the VMM's CPU time, which other guests of a busy host hardly change, and medians over turns
with all amounts. Not here: the memory of a clone's translated code (places.py).
"""

from __future__ import annotations

import contextlib
import re
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from benchmarks.kinds import new_name
from benchmarks.setup import Setup
from onecopy.errors import GuestFailed, Incompatible
from onecopy.guest.exec import run_captured
from onecopy.guest.lifecycle.start import start_one
from onecopy.guest.run_directory import GuestRecord
from onecopy.linux import process
from onecopy.linux.counters import smaps
from onecopy.model import MIB
from onecopy.vmm.monitor import connect

#: Bytes; the last one is QEMU's default, which drops no code here.
_SIZES = tuple(size * MIB for size in (16, 32, 64, 128, 1024))
_COMPILE = """\
import glob
for path in sorted(glob.glob("/usr/lib/python3*/*.py"))[::2]:
    compile(open(path, encoding="utf-8", errors="replace").read(), path, "exec")
"""
#: The work in a booted guest, besides booting it.
_JOBS = {
    "Python compiles its library": ["python3", "-c", _COMPILE],
    "40 short programs": [
        *("sh", "-c"),
        "for i in 1 2 3 4 5 6 7 8 9 10; do python3 -c 'import json, socket'; perl -e 1;"
        " ls / >/dev/null; dpkg -s dpkg >/dev/null; done",
    ],
}
_BOOT = "boot"


@dataclass(frozen=True, slots=True)
class Room:
    """The figures of one kind of work with one amount of memory for translated code."""

    work: str
    size: int
    """Bytes of memory for translated code."""
    cpu: float
    """Median CPU seconds of the VMM."""
    dropped: float
    """Median number of times that all translated code was dropped."""
    private: int
    """Private bytes of the VMM without guest RAM, at the end of the last turn."""


async def measure_translated(setup: Setup, turns: int, tell: Callable[[str], None]) -> list[Room]:
    """Measure all work with each amount, ``turns`` times; raise Incompatible unless under TCG."""
    if setup.prepared.accel.name != "tcg":
        raise Incompatible("KVM translates no code", hint="give --accel tcg")
    found: dict[tuple[str, int], list[tuple[float, int, int]]] = {}
    for turn in range(turns):
        for size in _SIZES[:: -1 if turn % 2 else 1]:
            tell(f"turn {turn + 1}: {size // MIB} MiB for translated code")
            async for work, cpu, dropped, private in _turn(setup, size):
                found.setdefault((work, size), []).append((cpu, dropped, private))
    return [
        Room(
            work,
            size,
            statistics.median(cpu for cpu, _, _ in each),
            statistics.median(dropped for _, dropped, _ in each),
            each[-1][2],
        )
        for (work, size), each in sorted(found.items())
    ]


async def _turn(setup: Setup, size: int) -> AsyncIterator[tuple[str, float, int, int]]:
    """Yield each work, its CPU seconds, the number of drops, and the VMM's private bytes."""
    async with _guest(setup, size) as guest:
        cpu, dropped = 0.0, 0
        for work in (_BOOT, *_JOBS):
            if work in _JOBS:
                folder = setup.host.run / guest.name
                done = await run_captured(folder, _JOBS[work], timeout=900)
                if done.exit_code:
                    raise GuestFailed(f"{work} failed: {done.stderr!r}")
            now, times = process.cpu_seconds(guest.pid), await _dropped(setup, guest)
            yield work, now - cpu, times - dropped, _private(guest)
            cpu, dropped = now, times


@contextlib.asynccontextmanager
async def _guest(setup: Setup, size: int) -> AsyncIterator[GuestRecord]:
    plan = replace(setup.prepared.varied(ready="true"), translated=size)
    guest = await start_one(setup.host, plan, new_name())
    try:
        yield guest
    finally:
        setup.host.end(guest)


async def _dropped(setup: Setup, guest: GuestRecord) -> int:
    async with connect(setup.host.run / guest.name) as monitor:
        said = await monitor.human("info jit")
    found = re.search(r"TB flush count\s+(\d{1,18})", said)
    if not found:
        raise GuestFailed("QEMU does not report how often it has dropped translated code")
    return int(found[1])


def _private(guest: GuestRecord) -> int:
    mappings: Sequence[smaps.Mapping] = smaps.read(guest.pid)
    return sum(m.private for m in mappings if not m.path.startswith("/") and m.size < guest.memory)
