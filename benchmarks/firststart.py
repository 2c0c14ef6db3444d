"""What the first start of a program costs: from a virtio disk, from the segment, and in a clone.

Counted in the guest, by probe.sh. Not here: guests whose application is measured (kinds.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from benchmarks.answers import TIMEOUT, before
from benchmarks.figures import Spread
from benchmarks.kinds import new_name
from benchmarks.plain import start_plain
from benchmarks.setup import Setup, resource
from onecopy.errors import NotReady
from onecopy.guest.exec import run_captured
from onecopy.guest.lifecycle.start import start_one

# The guest ends with its command, and its console is read first.
_PROBE_AND_STAY = resource("probe.sh") + "sleep 1000\n"
_LINE = re.compile(r"bench: (\d+) (\d+) (\d+) (\d+) ([\d.]+) ([\d.]+) (\d+)\r?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class FirstStart:
    """One kind of guest, several times."""

    faults: Spread
    """Major page faults in the guest while the program ran."""
    own_faults: Spread
    """The program's own, from its exec on."""
    bytes_read: Spread
    """Bytes that the guest read from block devices meanwhile."""
    seconds: Spread


async def measure_first_starts(
    setup: Setup, count: int, tell: Callable[[str], None]
) -> dict[str, FirstStart]:
    """``count`` fresh guests of each kind, in turn; the images are in the host's page cache."""
    lines: dict[str, list[list[float]]] = {"plain": [], "segment": [], "saved": []}
    for number in range(count):
        tell(f"first start of a program, {number + 1} of {count}")
        async with _plain(setup) as console:
            lines["plain"].append(await _line(console))
        async with _cold(setup) as console:
            lines["segment"].append(await _line(console))
        lines["saved"].append(await _saved(setup))
    return {kind: _first_start(each) for kind, each in lines.items()}


def _first_start(lines: list[list[float]]) -> FirstStart:
    return FirstStart(
        faults=Spread.of(line[1] - line[0] for line in lines),
        own_faults=Spread.of(line[6] for line in lines),
        bytes_read=Spread.of((line[3] - line[2]) * 512 for line in lines),
        seconds=Spread.of(line[5] - line[4] for line in lines),
    )


@contextlib.asynccontextmanager
async def _plain(setup: Setup) -> AsyncIterator[Path]:
    """The console of a plain guest that runs the probe."""
    vmm = start_plain(setup, new_name(), _PROBE_AND_STAY, ())
    try:
        await before(vmm.wait(), _line(vmm.folder / "console.log"))
        yield vmm.folder / "console.log"
    finally:
        await vmm.kill()


@contextlib.asynccontextmanager
async def _cold(setup: Setup) -> AsyncIterator[Path]:
    """The console of a guest that runs the probe from the segment."""
    plan = setup.prepared.varied(ready=None)
    prepared = replace(plan, config=replace(plan.config, command=_PROBE_AND_STAY))
    record = await start_one(setup.host, prepared, new_name())
    try:
        yield setup.host.run / record.name / "console.log"
    finally:
        setup.host.end(record)


async def _saved(setup: Setup) -> list[float]:
    """The figures of the probe in a clone, in whose saved system the program never ran."""
    record = await start_one(setup.host, setup.saved, new_name())
    try:
        done = await run_captured(
            setup.host.run / record.name, ["sh", "-c", resource("probe.sh")], timeout=TIMEOUT
        )
        found = _LINE.search(done.stdout.decode())
        if not found:
            raise NotReady(f"the probe failed in {record.name}: {done.stderr.decode()}")
        return [float(figure) for figure in found.groups()]
    finally:
        setup.host.end(record)


async def _line(console: Path) -> list[float]:
    """The figures of the probe's line, once it is there."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            found = _LINE.search(console.read_text(errors="replace"))
            if found:
                return [float(figure) for figure in found.groups()]
        await asyncio.sleep(0.2)
    raise NotReady(f"{console} has no figures after {TIMEOUT:g} s")
