"""Measures starts of many guests at once: booted, cloned, and from a pool, until all answer.

Booting as many guests would take too long, so fewer boot, and their time is scaled. Not here:
hundreds of guests (many.py), starts one after another (kinds.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from msgspec.structs import replace

from benchmarks.answers import answered
from benchmarks.kinds import new_name
from benchmarks.setup import Setup
from onecopy.demo.measure import free_ports
from onecopy.guest.lifecycle import boot, pool, restore
from onecopy.guest.lifecycle.batch import start_many
from onecopy.guest.ports import Ports
from onecopy.guest.run_directory import Batch, GuestRecord

_COLD = 8
#: Seconds to wait for an answer before the next attempt. A ready clone listens already, and further
#: requests only add load. A booting guest may miss the first request.
_PATIENCE, _COLD_PATIENCE = 30.0, 1.0

_Start = Callable[[str, Ports, Batch], Awaitable[GuestRecord]]


@dataclass(frozen=True, slots=True)
class Batches:
    """Seconds from the first start until the last answer over HTTP."""

    guests: int
    cold_guests: int
    cold: float
    """``cold_guests`` that boot."""
    saved: float
    prepared: float
    """``guests`` from a pool that was filled before."""

    @property
    def extrapolated(self) -> float:
        """Seconds that booting ``guests`` would take, extrapolated."""
        return self.cold / self.cold_guests * self.guests


async def measure_batches(setup: Setup, count: int, tell: Callable[[str], None]) -> Batches:
    """Start ``count`` clones at once, measure, and end them."""
    prepared = setup.prepared
    tell(f"{_COLD} guests that boot")
    cold = await _batch(
        setup,
        _COLD,
        lambda name, ports, batch: boot.boot_guest(
            setup.host,
            replace(prepared, spec=replace(prepared.spec, publish=ports, ready="true")),
            name,
            batch,
        ),
        _COLD_PATIENCE,
    )

    def clone(name: str, ports: Ports, batch: Batch) -> Awaitable[GuestRecord]:
        spec = restore.CloneSpec(publish=ports)
        return restore.start_clone(setup.host, setup.saved, name, spec, batch)

    tell(f"{count} clones")
    saved = await _batch(setup, count, clone)
    tell(f"{count} prepared clones")
    try:
        await pool.resize(setup.host, setup.saved.artifact, count)
        ready = await _batch(setup, count, clone)
    finally:
        await pool.resize(setup.host, setup.saved.artifact, 0)
    return Batches(count, _COLD, cold, saved, ready)


async def _batch(setup: Setup, count: int, starter: _Start, patience: float = _PATIENCE) -> float:
    ports = {new_name(): port for port in free_ports(count)}
    answers: list[asyncio.Task[None]] = []

    async def start_and_ask(name: str, batch: Batch) -> GuestRecord:
        record = await starter(name, ((ports[name], 80),), batch)
        # The next guest starts while this one answers.
        answers.append(asyncio.create_task(answered(ports[name], name, patience)))
        return record

    began = time.monotonic()
    try:
        await start_many(setup.host, list(ports), start_and_ask)
        await asyncio.gather(*answers)
        return time.monotonic() - began
    finally:
        setup.host.end(*(guest for guest in setup.host.guests() if guest.name in ports))
