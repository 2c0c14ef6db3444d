"""Check the report: compare what guests cost with the change of the host's used memory.

The host's memory is recorded when the first guest starts. Its increase since then must equal the
guests' memory, each page counted once, plus their files in the page cache. A fork server may be
older: what it had before is subtracted, even if it has ended since. Both sides come from the
kernel, but from different counters: those of processes and files, and /proc/meminfo.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from onecopy.errors import Incompatible, NotFound, OnecopyError, Unreadable
from onecopy.linux import bounded_wait, files, process
from onecopy.linux.counters import meminfo
from onecopy.linux.counters.meminfo import MemInfo

if TYPE_CHECKING:
    # The first guest's start only notes the host's memory here.
    from onecopy.sharing.account import GuestAccount
    from onecopy.sharing.report import Report

_T = TypeVar("_T")
#: Seconds to wait for one process.
_PATIENCE = 5.0
#: Reported since Linux 6.1, and nonzero only under KVM; before, it is part of the difference.
_NEW = "secondary_page_tables"
#: The kernel's own memory, as /proc/meminfo reports it.
_KERNEL_FIELDS = ("kernel_stacks", "unreclaimable", "per_cpu", _NEW)
#: Memory that the kernel can reclaim; ``cached`` includes shared memory, which it cannot.
_CACHES = ("cached", "buffers", "swap_cached", "reclaimable")


class Part(msgspec.Struct, frozen=True):
    """The contribution of one process, in bytes."""

    own: int = 0
    page_tables: int = 0


class Before(msgspec.Struct, frozen=True):
    """The host before the first guest started."""

    when: float
    """Seconds since the host's boot."""
    memory: MemInfo
    servers: tuple[Part, ...] = ()
    """The fork servers, which no guest used."""


class Check(msgspec.Struct, frozen=True):
    """Both sides and their difference in bytes, described by ``LINES``."""

    seconds: float
    """The time since the host's memory was recorded."""
    processes: int
    page_tables: int
    kernel: int
    blobs: int
    parts: int
    host: int
    difference: int
    ratio: float | None
    """The difference relative to the host's change; None without a change."""
    left_out: int = 0
    """The number of external QEMU processes that are not included: ended or not readable."""


LINES = (
    (
        "processes",
        "memory of QEMU",
        "Anonymous and shared memory of all QEMU processes started since, each page counted once "
        "(Pss_Anon, Pss_Shmem). Fork servers count, too, less what they had before.",
    ),
    ("page_tables", "page tables", "The page tables of the same processes."),
    (
        "kernel",
        "kernel",
        "The increase of kernel objects, stacks and per-CPU areas, whatever their use "
        "(/proc/meminfo).",
    ),
    (
        "blobs",
        "shared files",
        "Segments and saved RAM in the page cache, each page counted once.",
    ),
    ("parts", "total", "The sum of these."),
    (
        "host",
        "host",
        "The decrease of free memory since the first guest started (MemFree, and the CPUs' lists "
        "of free pages). It leaves out page cache and reclaimable memory, but counts those files.",
    ),
    (
        "difference",
        "difference",
        "The total minus the host's change. It includes memory that other programs took or freed.",
    ),
)


def note(path: Path, servers: Sequence[int] = (), root: Path = files.ROOT) -> None:
    """Record the host's memory in ``path``; errors are ignored, so that no start fails.

    Args:
        servers: the pids of the fork servers.
    """
    with suppress(OSError):
        files.replace(path, msgspec.json.encode(look(servers, root)))


def look(servers: Sequence[int] = (), root: Path = files.ROOT) -> Before:
    """Return the host's memory at present; see `note`."""
    found = []
    for pid in servers:
        with suppress(OnecopyError):  # it has just ended
            found.append(_measure(pid, process.page_table_bytes(pid, root), root))
    return Before(_now(), meminfo.read(root), tuple(found))


def read(path: Path) -> Before:
    """Read the recorded memory.

    Raises:
        NotFound: there is no record.
    """
    with suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(path.read_bytes(), type=Before)
    raise NotFound(
        "the host's memory was not recorded when the first guest started",
        hint="it is recorded when a guest starts and no other runs: stop all guests once",
    )


def check(before: Before, report: Report, root: Path = files.ROOT) -> Check:
    """Compare a report with the host's change since ``before``.

    External processes that cannot be read are left out.

    Raises:
        Incompatible: this kernel does not report one of the figures.
        NotFound: a guest has ended meanwhile.
        NotPermitted: this user may not read a guest's figures.
        Unreadable: a guest's figures are too large or late.
    """
    now = meminfo.read(root)
    ours = _all([*report.guests, *report.servers], None, root)
    others = _all(report.others, before.when, root)
    if failed := next((each for each in ours if isinstance(each, OnecopyError)), None):
        raise failed
    known = [each for each in (*ours, *others) if isinstance(each, Part)]
    processes = sum(each.own for each in known) - sum(each.own for each in before.servers)
    page_tables = sum(each.page_tables for each in known)
    page_tables -= sum(each.page_tables for each in before.servers)
    kernel = _increase(before.memory, now, _KERNEL_FIELDS)
    blobs = _require_figure(report.resident, "resident pages of a file")
    cache = _increase(before.memory, now, _CACHES) - _increase(before.memory, now, ("shmem",))
    host = -_increase(before.memory, now, ("unused",)) - cache + blobs
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


def _all(
    accounts: Sequence[GuestAccount], since: float | None, root: Path
) -> list[Part | OnecopyError | None]:
    part = partial(_part, since=since, root=root)
    return bounded_wait.each(part, accounts, _late, seconds=_PATIENCE, at_once=os.cpu_count() or 1)


def _part(each: GuestAccount, since: float | None, root: Path) -> Part | OnecopyError | None:
    """Return a process's contribution or an error; None if it started before ``since``."""
    try:
        if since is not None and process.start_time(each.pid, root) <= since:
            return None
        return _measure(each.pid, each.page_tables, root)
    except OnecopyError as error:
        return error


def _measure(pid: int, page_tables: int | None, root: Path) -> Part:
    from onecopy.linux.counters import smaps  # the start of the first guest rarely needs it

    rollup = _require_figure(
        smaps.read_rollup(pid, root), "a process's proportional share of its pages"
    )
    tables = _require_figure(page_tables, f"the page tables of process {pid}")
    return Part(rollup.anonymous + rollup.shared_memory, tables)


def _late(each: GuestAccount) -> OnecopyError:
    return Unreadable(f"process {each.pid} ({each.name}) did not answer within {_PATIENCE:g} s")


def _increase(before: MemInfo, now: MemInfo, fields: Sequence[str]) -> int:
    """Return the increase of the sum of some fields of /proc/meminfo."""
    return sum(
        _require_figure(getattr(now, field), field) - _require_figure(getattr(before, field), field)
        for field in fields
        if field != _NEW or getattr(now, field) is not None
    )


def _require_figure(figure: _T | None, name: str) -> _T:
    if figure is None:
        raise Incompatible(
            f"this kernel does not report {name}", hint="Linux 5.4 or later reports it"
        )
    return figure


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
