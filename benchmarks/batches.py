"""Many guests at once: booted, from the saved system, and prepared, until all have answered.

So many booted guests would take too long: fewer are, and the time for each is multiplied. Not here:
hundreds (many.py), one after another (kinds.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from benchmarks.answers import answered
from benchmarks.kinds import new_name
from benchmarks.setup import Setup
from onecopy.guest.lifecycle import pool_fill, start
from onecopy.guest.lifecycle.launchplan import BootSpec, CloneSpec
from onecopy.guest.run_directory import GuestRecord
from onecopy.model import Reference

_COLD = 8
#: Seconds for an answer before a guest is asked anew. A clone's application listens when it is
#: handed out, and each further question keeps all of them busier; a booting one may miss the first.
_PATIENCE, _COLD_PATIENCE = 30.0, 1.0


@dataclass(frozen=True, slots=True)
class Batches:
    """Seconds from the first start until the last answer over HTTP."""

    guests: int
    cold_guests: int
    cold: float
    """Of ``cold_guests`` that boot."""
    saved: float
    prepared: float
    """With a pool of ``guests``, filled before."""

    @property
    def extrapolated(self) -> float:
        """Seconds that ``guests`` would take to boot."""
        return self.cold / self.cold_guests * self.guests


async def measure_batches(setup: Setup, count: int, tell: Callable[[str], None]) -> Batches:
    """``count`` clones at once; nothing is left of them."""
    ports = ((0, 80),)
    tell(f"{_COLD} guests that boot")
    booting = replace(setup.spec, publish=ports, ready="true")
    cold = await _batch(setup, _COLD, booting, _COLD_PATIENCE)
    clone = CloneSpec(system=Reference.parse(setup.saved.source.ref), publish=ports)
    tell(f"{count} clones")
    saved = await _batch(setup, count, clone)
    tell(f"{count} prepared clones")
    try:
        await pool_fill.resize(setup.host, setup.saved.source, count)
        ready = await _batch(setup, count, clone)
    finally:
        await pool_fill.resize(setup.host, setup.saved.source, 0)
    return Batches(count, _COLD, cold, saved, ready)


async def _batch(
    setup: Setup, count: int, spec: BootSpec | CloneSpec, patience: float = _PATIENCE
) -> float:
    answers: list[asyncio.Task[None]] = []

    def ask(guest: GuestRecord) -> None:
        # The next guest starts while this one answers.
        answering = answered(guest.publish[0][0], guest.name, patience)
        answers.append(asyncio.create_task(answering))

    request = start.Request(spec, count, new_name(), overcommit=True)
    with setup.host.owner() as owner:
        began = time.monotonic()
        group = start.plan(setup.host, request)
        await start.start(setup.host, group, owner=owner, refill=False, ran=ask)
        await asyncio.gather(*answers)
        return time.monotonic() - began
