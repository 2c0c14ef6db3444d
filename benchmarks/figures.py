"""Measures running guests: memory, CPU time, and the time until each answered.

All figures come from /proc, by onecopy's readers. Not here: starting the guests (kinds.py).
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

#: Seconds between the last answer and the memory measurement; idle CPU time is measured in them.
SETTLE = 5.0


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one quantity."""

    median: float
    low: float
    high: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Compute the spread of one or more values."""
        known = tuple(values)
        return cls(statistics.median(known), min(known), max(known), known)


@dataclass(frozen=True, slots=True)
class Running:
    """A guest whose application has answered."""

    maps: GuestMaps
    seconds: float
    """Seconds from the request until the application answered."""
    cpu: float
    """CPU seconds of its VMM until then."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes per guest: the sum divided by the number of guests."""

    pss: float
    """Pss of the VMMs. A page is divided among its processes, and a fork server is one of them."""
    ram_private: float
    """Guest RAM that only this guest has."""
    vmm_private: float
    """Other memory that only this guest's VMM has: heap, translated code, stacks."""
    page_tables: float
    free_taken: float
    """Decrease of the host's MemFree, page cache included."""
    available_taken: float
    """Decrease of the host's MemAvailable."""


@dataclass(frozen=True, slots=True)
class Kind:
    """The figures of one way to run guests."""

    name: str
    guests: int
    first: float
    """Seconds until the first guest answered, with its files not in the page cache."""
    seconds: Spread
    """The same for the other guests."""
    memory: Memory
    cpu: float
    """Median CPU seconds per guest until its answer."""
    idle: float
    """CPU seconds per second of an idle guest."""
    helper_cpu: float = 0.0
    """CPU seconds of kernel threads (ksmd) per guest."""


async def settled(pids: Sequence[int]) -> float:
    """Wait until guests are idle; return the CPU seconds per second of one VMM."""
    began, before = time.monotonic(), cpu(pids)
    await asyncio.sleep(SETTLE)
    return (cpu(pids) - before) / (time.monotonic() - began) / len(pids)


def cpu(pids: Iterable[int]) -> float:
    """Return the CPU seconds of all these processes since their start."""
    return sum(process.cpu_seconds(pid) for pid in pids)


def memory(guests: Sequence[Running], before: meminfo.MemInfo) -> Memory:
    """Measure the guests' memory; ``before`` is the host's memory without them."""
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
    """Return the decrease of a field of /proc/meminfo; raise RuntimeError if it is missing."""
    if before is None or now is None:
        raise RuntimeError("/proc/meminfo lacks a field")
    return before - now


def evict(paths: Iterable[Path]) -> None:
    """Drop files from the page cache, so that all kinds of guests start equal (best effort)."""
    for path in paths:
        prefetch.drop(path)
