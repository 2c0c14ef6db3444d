"""KSM over running guests: on until nothing more is merged, then as it was.

Not here: KSM's counters and settings themselves (onecopy.linux.counters.ksm).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from onecopy.errors import Incompatible, NotReady
from onecopy.linux import process
from onecopy.linux.counters import ksm

#: The kernel's defaults are made for a machine that may take hours: 100 pages each 20 ms.
SETTINGS = {"pages_to_scan": 2000, "sleep_millisecs": 20, "run": 1}
#: Seconds after which merging that does not come to an end is given up.
TIMEOUT = 300.0
_EVERY = 2.0


@dataclass(frozen=True, slots=True)
class Merged:
    """What merging took."""

    seconds: float
    cpu: float
    """CPU seconds of ksmd."""
    full_scans: int


@contextlib.asynccontextmanager
async def merged() -> AsyncIterator[Merged]:
    """Run KSM until it has converged; its settings are restored at the end."""
    thread = ksm.thread()
    if thread is None:
        raise Incompatible("there is no ksmd", hint="measure without it: --no-ksm")
    began, cpu, scans = time.monotonic(), process.cpu_seconds(thread), _read().full_scans or 0
    with ksm.settings({**ksm.thorough(), **SETTINGS}):
        await converged()
        yield Merged(
            seconds=time.monotonic() - began,
            cpu=process.cpu_seconds(thread) - cpu,
            full_scans=(_read().full_scans or 0) - scans,
        )


async def converged() -> None:
    """Until pages_sharing has changed by less than 1 % three times, each over two whole scans."""
    deadline = time.monotonic() + TIMEOUT
    last, stable = _read(), 0
    while stable < 3:
        if time.monotonic() > deadline:
            raise NotReady(f"KSM still merges pages after {TIMEOUT:g} s")
        await asyncio.sleep(_EVERY)
        now = _read()
        if (now.full_scans or 0) < (last.full_scans or 0) + 2:
            continue
        before, sharing = last.pages_sharing or 0, now.pages_sharing or 0
        stable = stable + 1 if before and abs(sharing - before) < before * 0.01 else 0
        last = now


def _read() -> ksm.Ksm:
    state = ksm.read()
    if state is None:
        raise Incompatible("this kernel has no KSM", hint="measure without it: --no-ksm")
    return state
