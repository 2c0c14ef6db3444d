"""Figures of a number of running guests: memory, CPU time, and the time each took to answer.

All from /proc, through onecopy's own readers. Not here: how the guests were started (kinds.py).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from onecopy.linux import prefetch, process
from onecopy.linux.counters import meminfo
from onecopy.sharing.account import GuestAccount, GuestMaps, measure

#: Seconds from the last answer until the memory is read; idle CPU time is what is used meanwhile.
SETTLE = 5.0


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    low: float
    high: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        known = tuple(values)
        return cls(statistics.median(known), min(known), max(known), known)


@dataclass(frozen=True, slots=True)
class Running:
    """A guest whose application has answered."""

    maps: GuestMaps
    seconds: float
    """From asking for the guest until its application answered."""
    cpu: float
    """CPU seconds of its VMM up to then."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes per guest, n guests together divided by n."""

    pss: float
    """Pss of the VMMs: pages that several processes map count once in the sum."""
    ram_private: float
    """Pages of guest RAM that only this guest has."""
    vmm_private: float
    """All else that only this guest's VMM has: heap, translated code, stacks."""
    page_tables: float
    free_taken: float
    """How much less is free on the host than before: page cache included."""
    available_taken: float
    """How much less MemAvailable the host has than before."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to run guests, measured."""

    name: str
    guests: int
    first: float
    """Seconds until the first guest answered; the files that it needs were not in memory."""
    seconds: Spread
    """The same for the other guests."""
    memory: Memory
    cpu: float
    """CPU seconds per guest up to its answer, median."""
    idle: float
    """CPU seconds per second of one idle guest."""
    helper_cpu: float = 0.0
    """CPU seconds per guest of kernel threads that worked for it (ksmd)."""


async def settled(pids: Sequence[int]) -> float:
    """Let guests come to rest; return the CPU seconds per second that one VMM uses."""
    began, before = time.monotonic(), cpu(pids)
    await asyncio.sleep(SETTLE)
    return (cpu(pids) - before) / (time.monotonic() - began) / len(pids)


def cpu(pids: Iterable[int]) -> float:
    """CPU seconds of all these processes since their start."""
    return sum(process.cpu_seconds(pid) for pid in pids)


def memory(guests: Sequence[Running], before: meminfo.MemInfo) -> Memory:
    """What the guests take now; ``before`` was read when none of them ran."""
    accounts = [measure(guest.maps) for guest in guests]
    now = meminfo.read()
    return Memory(
        pss=_mean(accounts, "pss_total"),
        ram_private=_mean(accounts, "ram_private"),
        vmm_private=_mean(accounts, "vmm_private"),
        page_tables=_mean(accounts, "page_tables"),
        free_taken=taken(before.unused, now.unused) / len(guests),
        available_taken=taken(before.available, now.available) / len(guests),
    )


def _mean(accounts: Sequence[GuestAccount], field: str) -> float:
    figures: list[int | None] = [getattr(account, field) for account in accounts]
    known = [figure for figure in figures if figure is not None]
    if len(known) < len(figures):
        raise RuntimeError(f"{field} is unknown: {accounts[0].note}")
    return statistics.mean(known)


def taken(before: int | None, now: int | None) -> int:
    """How much less there is of a figure of /proc/meminfo; raise RuntimeError if it is not told."""
    if before is None or now is None:
        raise RuntimeError("/proc/meminfo does not tell")
    return before - now


def evict(paths: Iterable[Path]) -> None:
    """Drop files from the page cache, so that all kinds of guests begin alike (best effort)."""
    for path in paths:
        prefetch.drop(path)
