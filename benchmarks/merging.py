"""Runs KSM over guests until it merges nothing more, then restores its settings.

Not here: KSM's counters and settings (onecopy.linux.counters.ksm).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
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
async def merged(pids: Sequence[int] = ()) -> AsyncIterator[Merged]:
    """Run KSM until it has converged for these processes; then its settings are restored."""
    thread = ksm.thread()
    if thread is None:
        raise Incompatible("there is no ksmd", hint="measure without it: --no-ksm")
    began, cpu, scans = time.monotonic(), process.cpu_seconds(thread), _read().full_scans or 0
    with ksm.settings({**ksm.thorough(), **SETTINGS}):
        await converged(pids)
        now = _read()
        yield Merged(
            seconds=time.monotonic() - began,
            cpu=process.cpu_seconds(thread) - cpu,
            full_scans=(now.full_scans or 0) - scans,
            shared=(now.pages_shared or 0) * PAGE_SIZE,
            sharing=(now.pages_sharing or 0) * PAGE_SIZE,
        )


async def converged(pids: Sequence[int] = ()) -> None:
    """Wait until the merged pages change by less than 1 % over two full scans, three times.

    Args:
        pids: the processes whose pages count; none for all of the host.
    """
    deadline = time.monotonic() + TIMEOUT
    scans, before, stable = _read().full_scans or 0, _merged_pages(pids), 0
    while stable < 3:
        if time.monotonic() > deadline:
            raise NotReady(f"KSM still merges pages after {TIMEOUT:g} s")
        await asyncio.sleep(_EVERY)
        full_scans = _read().full_scans or 0
        if full_scans < scans + 2:
            continue
        now = _merged_pages(pids)
        stable = stable + 1 if before and abs(now - before) < before * 0.01 else 0
        scans, before = full_scans, now


def _merged_pages(pids: Sequence[int]) -> int:
    """Return the merged pages of processes, if this kernel reports them, or those of the host."""
    pages = [ksm.read_process(pid).merging_pages for pid in pids]
    known = [count for count in pages if count is not None]
    return sum(known) if pids and len(known) == len(pages) else _read().pages_sharing or 0


def _read() -> ksm.Ksm:
    state = ksm.read()
    if state is None:
        raise Incompatible("this kernel has no KSM", hint="measure without it: --no-ksm")
    return state
