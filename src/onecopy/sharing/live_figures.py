"""Guests as they are now, by counters that cost next to nothing to read.

/proc/PID/stat and status, which any user may read, and KSM's per-process file; not smaps, for which
the kernel walks all page tables. So private and shared are by kind of memory here, not by who maps
it: the exact figures are those of ``account``.
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

#: How long one process may keep us waiting, in seconds.
_PATIENCE = 1.0


class Sample(msgspec.Struct, frozen=True):
    """One guest's QEMU at one moment; bytes, None is unknown."""

    name: str
    pid: int
    cpu_seconds: float
    own: int | None
    """Anonymous memory that is in memory; what KSM merged is in it, once for each place."""
    shared: int | None
    """Pages of files and of shared memory that it maps."""
    swapped: int | None
    page_tables: int | None
    merged: int | None
    start_ticks: int = 0
    """With ``pid``, its identity."""


class Row(msgspec.Struct, frozen=True):
    """The same, and how busy it is."""

    sample: Sample
    cpu: float | None
    """Share of one processor since the sample before; None at first."""


def sample(
    guests: Iterable[tuple[str, int]], *, merging: bool, root: Path = files.ROOT
) -> list[Sample]:
    """All ``guests``, (name, pid) each, that still run; without ``merging`` nothing is merged."""
    one = partial(_sample, merging=merging, root=root)
    found = bounded_wait.each(one, list(guests), lambda _: None, seconds=_PATIENCE)
    return [each for each in found if each]


def _sample(guest: tuple[str, int], merging: bool, root: Path) -> Sample | None:
    name, pid = guest
    with suppress(NotFound, NotPermitted, Unreadable):
        told, stat = process.memory(pid, root), process.stat(pid, root)
        mapped = (told.files, told.shared_memory)
        return Sample(
            name=name,
            pid=pid,
            cpu_seconds=process.cpu_seconds_of(stat),
            own=told.anonymous,
            shared=None if None in mapped else sum(filter(None, mapped)),
            swapped=told.swapped,
            page_tables=told.page_tables,
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
    """``now`` with what each guest has done in the ``seconds`` since ``before``."""
    earlier = {(each.pid, each.start_ticks): each.cpu_seconds for each in before}

    def cpu(each: Sample) -> float | None:
        was = earlier.get((each.pid, each.start_ticks))
        return None if was is None or seconds <= 0 else (each.cpu_seconds - was) / seconds

    return [Row(each, cpu(each)) for each in now]


#: What rows can be sorted by; the largest first, but for names.
SORTS = ("cpu", "own", "shared", "merged", "name")


def ordered(found: Iterable[Row], by: str) -> list[Row]:
    """Rows sorted by one of ``SORTS``; what is unknown comes last."""
    if by == "name":
        return sorted(found, key=lambda row: in_order(row.sample.name))

    def key(row: Row) -> tuple[bool, float]:
        figure = row.cpu if by == "cpu" else getattr(row.sample, by)
        return figure is None, -(figure or 0)

    return sorted(found, key=key)
