"""Do the parts add up: what guests are said to cost, against the host's own change in used memory.

The host's memory is noted when the first guest starts. What it uses more now must be what the
guests have, each page once, and their files in the page cache. Both sides are the kernel's figures,
but from different counters: those of each process and file, and /proc/meminfo.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from onecopy.errors import Incompatible, NotFound, OnecopyError, Unreadable
from onecopy.linux import bounded_wait, files, process
from onecopy.linux.counters import meminfo, smaps
from onecopy.linux.counters.meminfo import MemInfo
from onecopy.sharing.account import GuestAccount
from onecopy.sharing.report import Report

_T = TypeVar("_T")
#: How long one process may keep us waiting, in seconds.
_PATIENCE = 5.0
#: Told from Linux 6.1 on, and under KVM only more than 0: before, the difference has it.
_NEW = "secondary_page_tables"
#: What the kernel keeps for itself and tells in /proc/meminfo.
_KERNELS = ("kernel_stacks", "unreclaimable", "per_cpu", _NEW)
#: What it gives back when memory is needed; ``cached`` has shared memory in it, which it does not.
_CACHES = ("cached", "buffers", "swap_cached", "reclaimable")


class Before(msgspec.Struct, frozen=True):
    """The host when no guest ran."""

    when: float
    """Seconds from the host's boot."""
    memory: MemInfo


class Check(msgspec.Struct, frozen=True):
    """Both sides, in bytes, and what is between them; ``LINES`` says what each figure counts."""

    seconds: float
    """How long ago the host's memory was noted."""
    processes: int
    page_tables: int
    kernel: int
    blobs: int
    parts: int
    host: int
    difference: int
    ratio: float | None
    """The difference by the host's change; None when there is none."""
    left_out: int = 0
    """How many QEMU processes of others are not in it: ended, or not to be looked at."""


LINES = (
    (
        "processes",
        "memory of QEMU",
        "Anonymous and shared memory of all QEMU processes started since, each page once "
        "(Pss_Anon, Pss_Shmem).",
    ),
    ("page_tables", "page tables", "Those of the same processes."),
    (
        "kernel",
        "kernel",
        "What its objects, stacks and per-CPU areas grew by, whatever for (/proc/meminfo).",
    ),
    (
        "blobs",
        "shared files",
        "Segments and saved RAM, as far as they are in the page cache, each page once.",
    ),
    ("parts", "in all", "The sum of these."),
    (
        "host",
        "the host",
        "What is less free than when the first guest started (MemFree, and the CPUs' lists of free "
        "pages), without page cache and what the kernel can give back, but with those files.",
    ),
    (
        "difference",
        "difference",
        "The parts less the host's change. What other programs took or gave back is in it.",
    ),
)


def note(path: Path, root: Path = files.ROOT) -> None:
    """Keep the host's memory as it is now in ``path``; no start fails for want of it."""
    with suppress(OSError):
        files.replace(path, msgspec.json.encode(Before(_now(), meminfo.read(root))))


def read(path: Path) -> Before:
    """What was noted. Raises NotFound."""
    with suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(path.read_bytes(), type=Before)
    raise NotFound(
        "the host's memory was not noted when the first guest started",
        hint="it is noted when a guest starts and no other runs: stop all guests once",
    )


def check(before: Before, report: Report, root: Path = files.ROOT) -> Check:
    """Compare a report with the host's change since ``before``.

    Raises Incompatible when the kernel does not tell one of the figures, NotFound when a guest ends
    meanwhile, NotPermitted and Unreadable when one cannot be looked at; others are left out then.
    """
    now = meminfo.read(root)
    ours = _all(report.guests, None, root)
    others = _all(report.others, before.when, root)
    if failed := next((each for each in ours if isinstance(each, OnecopyError)), None):
        raise failed
    known = [each for each in (*ours, *others) if isinstance(each, _Part)]
    processes = sum(each.own for each in known)
    page_tables = sum(each.page_tables for each in known)
    kernel = _grown(before.memory, now, _KERNELS)
    blobs = _told(report.resident, "resident pages of a file")
    cache = _grown(before.memory, now, _CACHES) - _grown(before.memory, now, ("shmem",))
    host = -_grown(before.memory, now, ("unused",)) - cache + blobs
    parts = processes + page_tables + kernel + blobs
    return Check(
        seconds=_now() - before.when,
        processes=processes,
        page_tables=page_tables,
        kernel=kernel,
        blobs=blobs,
        parts=parts,
        host=host,
        difference=parts - host,
        ratio=(parts - host) / host if host > 0 else None,
        left_out=sum(isinstance(each, OnecopyError) for each in others) + len(report.left_out),
    )


class _Part(msgspec.Struct, frozen=True):
    """What one process adds, in bytes."""

    own: int
    page_tables: int


def _all(
    accounts: Sequence[GuestAccount], since: float | None, root: Path
) -> list[_Part | OnecopyError | None]:
    part = partial(_part, since=since, root=root)
    return bounded_wait.each(part, accounts, _late, seconds=_PATIENCE, at_once=os.cpu_count() or 1)


def _part(each: GuestAccount, since: float | None, root: Path) -> _Part | OnecopyError | None:
    """One process's part, or why it cannot be told; None if it was started before ``since``."""
    try:
        if since is not None and process.start_time(each.pid, root) <= since:
            return None
        rollup = _told(smaps.read_rollup(each.pid, root), "a process's share of its pages")
        page_tables = _told(each.page_tables, f"the page tables of process {each.pid}")
    except OnecopyError as error:
        return error
    return _Part(rollup.anonymous + rollup.shared_memory, page_tables)


def _late(each: GuestAccount) -> OnecopyError:
    return Unreadable(f"process {each.pid} ({each.name}) keeps us waiting")


def _grown(before: MemInfo, now: MemInfo, fields: Sequence[str]) -> int:
    """What the sum of some fields of /proc/meminfo grew by."""
    return sum(
        _told(getattr(now, field), field) - _told(getattr(before, field), field)
        for field in fields
        if field != _NEW or getattr(now, field) is not None
    )


def _told(figure: _T | None, what: str) -> _T:
    if figure is None:
        raise Incompatible(f"this kernel does not tell {what}", hint="Linux 5.4 or later does")
    return figure


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
