"""What an idle clone costs the host beyond the shared copy, by what is mapped.

One clone runs before the figures begin, so that what clones share is in memory already and each
further one adds only what is its own. Not here: guests that have answered requests (kinds.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from benches.figures import Memory, Running, memory, settled
from benches.kinds import new_name
from benches.merging import merged
from benches.places import Place, places
from benches.setup import Setup
from onecopy.guest.maps import guest_maps
from onecopy.guest.start import start_clone
from onecopy.host import meminfo, process


@dataclass(frozen=True, slots=True)
class Idle:
    """Clones that have been left alone since their start."""

    guests: int
    merged: bool
    """KSM has merged what it can, QEMU's own memory included."""
    memory: Memory
    places: list[Place]
    idle: float
    """CPU seconds per second of one."""


async def measure_idle(
    setup: Setup, count: int, with_ksm: bool, tell: Callable[[str], None]
) -> list[Idle]:
    """``count`` clones, and the same number with KSM over the VMMs' memory."""
    tell(f"{count} idle clones")
    async with _clones(setup, count, merge=False) as (guests, before):
        found = [await _figures(setup, guests, before, merged=False)]
    if with_ksm:
        tell(f"{count} idle clones, until KSM has merged what it can")
        async with _clones(setup, count, merge=True) as (guests, before), merged():
            found.append(await _figures(setup, guests, before, merged=True))
    return found


async def _figures(
    setup: Setup, guests: Sequence[Running], before: meminfo.MemInfo, *, merged: bool
) -> Idle:
    idle = await settled(guests)
    return Idle(len(guests), merged, memory(guests, before), places(guests, setup.saved), idle)


@contextlib.asynccontextmanager
async def _clones(
    setup: Setup, count: int, *, merge: bool
) -> AsyncIterator[tuple[list[Running], meminfo.MemInfo]]:
    """``count`` clones at rest, and the host's memory when there was one before them."""
    async with contextlib.AsyncExitStack() as ends:
        first = [await _start(setup, ends, merge=merge)]
        await settled(first)
        before = meminfo.read()
        yield [await _start(setup, ends, merge=merge) for _ in range(count)], before


async def _start(setup: Setup, ends: contextlib.AsyncExitStack, *, merge: bool) -> Running:
    record = await start_clone(setup.host, setup.saved, new_name(), merge=merge)
    ends.callback(setup.host.end, record)
    (maps,) = guest_maps([record])
    await asyncio.sleep(0)
    return Running(maps, record.start_seconds, process.cpu_seconds(record.pid))
