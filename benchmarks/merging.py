"""Runs KSM over guests until it merges nothing more, then restores its settings.

Not here: KSM's counters and settings (onecopy.linux.counters.ksm).
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
from onecopy.model import PAGE_SIZE

#: The kernel's defaults, 100 pages every 20 ms, would take hours.
SETTINGS = {"pages_to_scan": 2000, "sleep_millisecs": 20, "run": 1}
#: Seconds after which unfinished merging is a failure; an emulated host is slow.
TIMEOUT = 1800.0
_EVERY = 2.0


@dataclass(frozen=True, slots=True)
class Merged:
    """The cost of merging."""

    seconds: float
    cpu: float
    """CPU seconds of ksmd."""
    full_scans: int
    shared: int
    """Bytes of merged pages on the host, each counted once."""
    sharing: int
    """Bytes of further mappings of these: what KSM has saved on the host."""


@contextlib.asynccontextmanager
async def merged() -> AsyncIterator[Merged]:
    """Run KSM until it has converged; its settings are restored at the end."""
    thread = ksm.thread()
    if thread is None:
        raise Incompatible("there is no ksmd", hint="measure without it: --no-ksm")
    began, cpu, scans = time.monotonic(), process.cpu_seconds(thread), _read().full_scans or 0
    with ksm.settings({**ksm.thorough(), **SETTINGS}):
        await converged()
        now = _read()
        yield Merged(
            seconds=time.monotonic() - began,
            cpu=process.cpu_seconds(thread) - cpu,
            full_scans=(now.full_scans or 0) - scans,
            shared=(now.pages_shared or 0) * PAGE_SIZE,
            sharing=(now.pages_sharing or 0) * PAGE_SIZE,
        )


async def converged() -> None:
    """Wait until pages_sharing changes by less than 1 % over two full scans, three times."""
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
