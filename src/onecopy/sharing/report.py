"""Accounts of many guests side by side, with shared memory counted once.

``COLUMNS`` and ``BLOB_COLUMNS`` declare every figure. Tables, JSON and documentation use them.

Not here: one guest's account (``account``), and printing (``onecopy.cli``).
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec
from msgspec.structs import replace

from onecopy.errors import InvalidInput, NotFound, NotPermitted
from onecopy.linux import bounded_wait, files
from onecopy.linux.counters import residency
from onecopy.sharing.account import GuestAccount, GuestMaps, measure, unreadable

#: Increases when a field of ``Report.to_json`` is removed or changes its meaning.
JSON_VERSION = 1
#: Seconds to wait for one process or file.
_PATIENCE = 5.0


class Column(msgspec.Struct, frozen=True):
    """One figure of a report: its field, heading and meaning."""

    #: The attribute, and the field in JSON.
    key: str
    heading: str
    #: What it counts.
    counts: str
    #: Whether the values are bytes; otherwise text or plain numbers.
    is_bytes: bool = True
    #: Whether ``Report.totals`` has the sum over all guests.
    summed: bool = True


COLUMNS = (
    Column("name", "GUEST", "The guest's name.", is_bytes=False, summed=False),
    Column("pid", "PID", "The guest's QEMU process.", is_bytes=False, summed=False),
    Column("ram_size", "RAM", "The guest's RAM, used or not."),
    Column(
        "ram_private",
        "RAM OWN",
        "RAM that only this guest has, in memory or swap. It was written since the start. Pages "
        "that KSM merged are left out if the kernel reports them per mapping.",
    ),
    Column(
        "ram_shared",
        "RAM SHARED",
        "RAM in memory that still is the saved system's page. The total counts a page once for "
        "each guest that maps it; the blob's resident bytes count it once.",
    ),
    Column(
        "ram_proportional",
        "RAM PROP.",
        "RAM in memory, each page divided by the number of processes that map it.",
    ),
    Column(
        "segments_mapped",
        "SEG MAPPED",
        "Address space of the segments that this guest maps, in memory or not.",
    ),
    Column(
        "segments",
        "SEG RESIDENT",
        "Segment pages that this guest has mapped in. The total counts a page once for each "
        "guest that maps it; the blob's resident bytes count it once.",
    ),
    Column(
        "segments_private",
        "SEG OWN",
        "The guest's own copies of segment pages, in memory or swap: pages that it wrote to.",
    ),
    Column(
        "vmm_private",
        "VMM OWN",
        "QEMU's memory besides RAM and segments that no other process maps, in memory or swap.",
    ),
    Column(
        "vmm_shared",
        "VMM SHARED",
        "QEMU's memory besides RAM and segments that other processes map too: its program, "
        "libraries, merged pages, and pages that it still shares with its fork server and the "
        "guests of that. The total counts a page once for each guest that maps it.",
    ),
    Column(
        "pss_total",
        "PROPORTIONAL",
        "All pages of the guest in memory, each divided by the number of processes that map it. "
        "The total counts every page once if only these guests map it. The fork server maps pages, "
        "too, and has its own share of them.",
    ),
    Column("page_tables", "PAGE TABLES", "The kernel's page tables for the QEMU process."),
    Column("swapped", "SWAPPED", "The part of all this in swap."),
    Column("huge", "HUGE", "The part of all this in huge pages: anonymous, of files, or hugetlb."),
    Column(
        "ksm",
        "KSM",
        "Pages of RAM and VMM that KSM merged; the total counts a page once for each place.",
    ),
    Column("note", "NOTE", "Why figures are unknown.", is_bytes=False, summed=False),
)

BLOB_COLUMNS = (
    Column("name", "NAME", "The segment's name; for RAM the names of its guests.", is_bytes=False),
    Column("kind", "KIND", "segment, or ram for a file that backs RAM.", is_bytes=False),
    Column("path", "FILE", "The file that guests map.", is_bytes=False),
    Column("size", "SIZE", "The file's length, holes included."),
    Column(
        "resident",
        "RESIDENT",
        "Bytes of the file in the host's page cache, counted once however many guests map it.",
    ),
    Column(
        "guests",
        "GUESTS",
        "The number of guests that map it.",
        is_bytes=False,
    ),
    Column(
        "others", "OTHERS", "The number of external QEMU processes that map it.", is_bytes=False
    ),
)


class Blob(msgspec.Struct, frozen=True):
    """A file that guests map, described by ``BLOB_COLUMNS``; None is unknown."""

    name: str
    kind: str
    path: str
    size: int | None
    resident: int | None
    guests: int | None
    others: int | None


class Report(msgspec.Struct, frozen=True):
    """The accounts of all guests, and the files that they share."""

    guests: tuple[GuestAccount, ...]
    blobs: tuple[Blob, ...]
    #: The external QEMU processes of the host.
    others: tuple[GuestAccount, ...] = ()
    #: What could not be examined at all, one sentence each.
    left_out: tuple[str, ...] = ()
    #: This user's fork servers.
    servers: tuple[GuestAccount, ...] = ()

    @property
    def totals(self) -> dict[str, int | None]:
        """Bytes per summed column over ``guests``; None if one figure is unknown."""
        return totals(self.guests)

    @property
    def resident(self) -> int | None:
        """Bytes of the guests' files in the page cache, each page counted once.

        Files that only external processes map are left out. None if one figure is unknown.
        """
        return _sum(blob.resident for blob in self.blobs if blob.guests != 0)

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON values with stable fields; null is unknown.

        The fields are ``version`` (``JSON_VERSION``); ``guests``, with the keys of ``COLUMNS`` and
        ``ram_path``, where ``segments`` is a list of the fields of ``SegmentUse``; ``others``, the
        same for external QEMU processes; ``servers``, the same for fork servers; ``blobs``, with
        the keys of ``BLOB_COLUMNS``; ``totals``, the sums over guests; ``blobs_resident``, the sum
        over the files that guests map; and ``left_out``, what could not be examined, one sentence
        each.
        """
        return {
            "version": JSON_VERSION,
            "guests": [msgspec.to_builtins(guest) for guest in self.guests],
            "others": [msgspec.to_builtins(guest) for guest in self.others],
            "servers": [msgspec.to_builtins(guest) for guest in self.servers],
            "blobs": [msgspec.to_builtins(blob) for blob in self.blobs],
            "totals": self.totals,
            "blobs_resident": self.resident,
            "left_out": list(self.left_out),
        }


def value(guest: GuestAccount, column: Column) -> int | None:
    """Return a guest's figure in a column of bytes; None if unknown."""
    if column.key == "segments":
        return None if guest.segments is None else sum(s.resident for s in guest.segments)
    figure: int | None = getattr(guest, column.key)
    return figure


def totals(guests: Iterable[GuestAccount]) -> dict[str, int | None]:
    """Return bytes per summed column over some guests; None if one figure is unknown."""
    known = list(guests)
    return {
        column.key: _sum(value(guest, column) for guest in known)
        for column in COLUMNS
        if column.summed
    }


def collect(
    guests: Iterable[GuestMaps],
    others: Iterable[GuestMaps] = (),
    *,
    servers: Iterable[GuestMaps] = (),
    left_out: Sequence[str] = (),
    root: Path = files.ROOT,
) -> Report:
    """Read the kernel's figures for all guests, external processes and fork servers.

    Processes that end meanwhile are left out. For one that cannot be read, only the reason is
    known.

    Args:
        left_out: passed on to the report.

    Raises:
        Incompatible: this kernel has no smaps.
    """
    known, external, serving = list(guests), list(others), list(servers)
    every = [*known, *external, *serving]
    measure_one = partial(_measure, root=root)
    # Half of the time is spent in the kernel, which can serve several threads at once.
    accounts = bounded_wait.each(
        measure_one, every, _late, seconds=_PATIENCE, at_once=os.cpu_count() or 1
    )
    alive = [(maps, account) for maps, account in zip(every, accounts, strict=True) if account]
    pids = {maps.pid for maps in known}
    mapping = [(maps, account) for maps, account in alive if not maps.serves]
    return Report(
        tuple(account for maps, account in mapping if maps.pid in pids),
        tuple(_blobs(mapping, pids, root)),
        tuple(account for maps, account in mapping if maps.pid not in pids),
        tuple(left_out),
        tuple(account for maps, account in alive if maps.serves),
    )


def _measure(maps: GuestMaps, root: Path) -> GuestAccount | None:
    with suppress(NotFound):
        return measure(maps, root)
    return None


def _late(maps: GuestMaps) -> GuestAccount:
    return unreadable(maps, f"the process did not show its memory map within {_PATIENCE:g} s")


def _blobs(
    alive: Sequence[tuple[GuestMaps, GuestAccount]], pids: Container[int], root: Path
) -> list[Blob]:
    """List the files that some processes map; ``pids`` are the guests, all others are external."""
    segments: dict[str, str] = {}
    ram: dict[str, list[GuestMaps]] = {}
    identities: dict[str, files.Identity | None] = {}
    for maps, _ in alive:
        for path, name in maps.segments.items():
            # onecopy's name of a file takes precedence over that of an external process.
            if _is_known(maps, path):
                identities.setdefault(maps.file(path), _identity(maps, path))
                segments.setdefault(maps.file(path), name)
        if backing := _shared_ram(maps, root):
            identities.setdefault(backing, _identity(maps, backing))
            ram.setdefault(backing, []).append(maps)
    by_owner = [a for a in alive if a[0].pid in pids], [a for a in alive if a[0].pid not in pids]
    hidden = any(account.segments is None for _, account in by_owner[1])
    found = []
    for path, name in sorted(segments.items()):
        guests, others = (_mapping_guests(path, group) for group in by_owner)
        found.append(Blob(name, "segment", path, None, None, guests, others))
    for path, users in sorted(ram.items()):
        names = ", ".join(maps.name for maps in users)
        guests = sum(maps.pid in pids for maps in users)
        others = None if hidden else len(users) - guests
        found.append(Blob(names, "ram", path, None, None, guests, others))
    measure_one = partial(_with_sizes, identities=identities, root=root)
    return bounded_wait.each(measure_one, found, lambda blob: blob, seconds=_PATIENCE)


def _shared_ram(maps: GuestMaps, root: Path) -> str | None:
    """Return the file of a guest's RAM if others could map it by its path.

    A memfd does not count, because its name is not unique; nor does a directory.
    """
    path = maps.ram_path
    if path is None or path.startswith("/memfd:") or not _is_known(maps, path):
        return None
    # The paths of external processes were checked before.
    return None if maps.regular is None and _is_directory(root / path.lstrip("/")) else path


def _is_directory(path: Path) -> bool:
    with suppress(OSError):
        return path.is_dir()
    return False


def _identity(maps: GuestMaps, path: str) -> files.Identity | None:
    return None if maps.regular is None else maps.regular[path]


def _mapping_guests(path: str, group: Sequence[tuple[GuestMaps, GuestAccount]]) -> int | None:
    return _sum(
        None
        if account.segments is None
        else sum(
            use.path == path and use.mapped > 0 and _is_known(maps, path)
            for use in account.segments
        )
        for maps, account in group
    )


def _is_known(maps: GuestMaps, path: str) -> bool:
    """Whether an external process's path is the same regular file here."""
    return maps.regular is None or path in maps.regular


def _with_sizes(blob: Blob, identities: Mapping[str, files.Identity | None], root: Path) -> Blob:
    """Add the file's own figures, unless it is gone or not readable for this user."""
    real, same_as = root / blob.path.lstrip("/"), identities[blob.path]
    with suppress(OSError, NotFound, NotPermitted, InvalidInput):
        found = real.stat()
        if same_as in (None, (found.st_dev, found.st_ino)):
            blob = replace(blob, size=found.st_size)
            blob = replace(blob, resident=residency.resident_bytes(real, same_as))
    return blob


def _sum(figures: Iterable[int | None]) -> int | None:
    """Return the sum; None if one figure is unknown."""
    total = 0
    for figure in figures:
        if figure is None:
            return None
        total += figure
    return total
