"""The current state of guests, from counters that cost almost nothing to read.

These are /proc/PID/stat and status, which any user may read, and KSM's file of each process. smaps
is not read, because the kernel would walk all page tables for it. So the figures distinguish kinds
of memory, not who maps it: `account` has the exact figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from onecopy.errors import NotFound, NotPermitted, Unreadable
from onecopy.linux import bounded_wait, files, process
from onecopy.linux.counters import ksm
from onecopy.model import PAGE_SIZE, in_order

#: Seconds to wait for one process.
_PATIENCE = 1.0


class Sample(msgspec.Struct, frozen=True):
    """One guest's QEMU at one moment; bytes, None is unknown."""

    name: str
    pid: int
    cpu_seconds: float
    own: int | None
    """Resident anonymous memory; a page merged by KSM counts at each place."""
    shared: int | None
    """Resident pages of files and shared memory."""
    swapped: int | None
    page_tables: int | None
    merged: int | None
    start_ticks: int = 0
    """With ``pid``, the identity of the process."""


class Row(msgspec.Struct, frozen=True):
    """A sample, and the guest's CPU use."""

    sample: Sample
    cpu: float | None
    """CPUs used since the previous sample; None for the first."""


def sample(
    guests: Iterable[tuple[str, int]], *, merging: bool, root: Path = files.ROOT
) -> list[Sample]:
    """Sample all guests that still run.

    Args:
        guests: (name, pid) of each.
        merging: read KSM's counters; otherwise nothing counts as merged.
    """
    one = partial(_sample, merging=merging, root=root)
    found = bounded_wait.each(one, list(guests), lambda _: None, seconds=_PATIENCE)
    return [each for each in found if each]


def _sample(guest: tuple[str, int], merging: bool, root: Path) -> Sample | None:
    name, pid = guest
    with suppress(NotFound, NotPermitted, Unreadable):
        memory, stat = process.memory(pid, root), process.stat(pid, root)
        mapped = (memory.files, memory.shared_memory)
        return Sample(
            name=name,
            pid=pid,
            cpu_seconds=process.cpu_seconds_of(stat),
            own=memory.anonymous,
            shared=None if None in mapped else sum(filter(None, mapped)),
            swapped=memory.swapped,
            page_tables=memory.page_tables,
            merged=_merged(pid, root) if merging else 0,
            start_ticks=stat.start_ticks,
        )
    return None


def _merged(pid: int, root: Path) -> int | None:
    with suppress(NotPermitted, Unreadable):
        pages = ksm.read_process(pid, root).merging_pages
        return None if pages is None else pages * PAGE_SIZE
    return None


def rows(now: Sequence[Sample], before: Sequence[Sample], seconds: float) -> list[Row]:
    """Combine ``now`` with the CPU time of each guest in the ``seconds`` since ``before``."""
    earlier = {(each.pid, each.start_ticks): each.cpu_seconds for each in before}

    def cpu(each: Sample) -> float | None:
        earlier_seconds = earlier.get((each.pid, each.start_ticks))
        return (
            None
            if earlier_seconds is None or seconds <= 0
            else (each.cpu_seconds - earlier_seconds) / seconds
        )

    return [Row(each, cpu(each)) for each in now]


#: Sort keys; all are descending, except names.
SORTS = ("cpu", "own", "shared", "merged", "name")


def ordered(found: Iterable[Row], by: str) -> list[Row]:
    """Sort rows by one of ``SORTS``; unknown figures come last."""
    if by == "name":
        return sorted(found, key=lambda row: in_order(row.sample.name))

    def key(row: Row) -> tuple[bool, float]:
        figure = row.cpu if by == "cpu" else getattr(row.sample, by)
        return figure is None, -(figure or 0)

    return sorted(found, key=key)
