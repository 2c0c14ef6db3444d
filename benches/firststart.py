"""What the first start of a program costs a guest: from a virtio disk, and from the segment.

Counted in the guest, by probe.sh. Not here: guests whose application is measured (kinds.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benches.answers import TIMEOUT, before, free_port
from benches.figures import Spread
from benches.kinds import new_name
from benches.plain import start_plain
from benches.setup import Setup, resource
from onecopy.errors import NotReady
from onecopy.guest.boot import run_cold

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
    lines: dict[str, list[list[float]]] = {"plain": [], "segment": []}
    for number in range(count):
        tell(f"first start of a program, {number + 1} of {count}")
        async with _plain(setup) as console:
            lines["plain"].append(await _line(console))
        async with _cold(setup) as console:
            lines["segment"].append(await _line(console))
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
    vmm = start_plain(setup, new_name(), resource("probe.sh"), free_port())
    try:
        await before(vmm.wait(), _line(vmm.folder / "console.log"))
        yield vmm.folder / "console.log"
    finally:
        await vmm.kill()


@contextlib.asynccontextmanager
async def _cold(setup: Setup) -> AsyncIterator[Path]:
    """The console of a guest that runs the probe from the segment."""
    spec = replace(setup.prepared.spec, ready=None)
    prepared = replace(setup.prepared, spec=spec, command=resource("probe.sh"))
    record = await run_cold(setup.host, prepared, new_name())
    try:
        yield setup.host.run / record.name / "console.log"
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
