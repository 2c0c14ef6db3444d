"""Many guests side by side, and what they have in common counted once.

``COLUMNS`` and ``BLOB_COLUMNS`` declare every figure once: tables, JSON and documentation come
from them. Not here: one guest's account (``account``), and printing (``onecopy.cli``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from onecopy.errors import NotFound, NotPermitted
from onecopy.host import files, residency
from onecopy.sharing.account import GuestAccount, GuestMaps, measure

#: Grows when a field of ``Report.to_json`` changes its meaning or goes; new fields do not count.
JSON_VERSION = 1


class Column(msgspec.Struct, frozen=True):
    """One figure of a report: where it is, how it is headed, and what it counts."""

    #: The attribute, and the field in JSON.
    key: str
    heading: str
    #: One sentence.
    counts: str
    #: Bytes; else text or a plain number.
    is_bytes: bool = True
    #: Whether the sum over all guests stands in ``Report.totals``.
    summed: bool = True


COLUMNS = (
    Column("name", "GUEST", "The guest's name.", is_bytes=False, summed=False),
    Column("pid", "PID", "The guest's QEMU process.", is_bytes=False, summed=False),
    Column("ram_size", "RAM", "The RAM that the guest sees, used or not."),
    Column(
        "ram_private",
        "RAM OWN",
        "RAM that this guest alone has, in memory or swap: written by it since its start; "
        "what KSM merged is left out where the kernel tells it per mapping.",
    ),
    Column(
        "ram_shared",
        "RAM SHARED",
        "RAM in memory that is still the saved system's page; the total counts a page once "
        "for each guest that maps it, the blob's resident bytes count it once.",
    ),
    Column(
        "segments_mapped",
        "SEG MAPPED",
        "Address space of the segments that this guest maps, in memory or not.",
    ),
    Column(
        "segments",
        "SEG RESIDENT",
        "Segment pages that this guest has mapped in; the total counts a page once for each "
        "guest that maps it, the blob's resident bytes count it once.",
    ),
    Column(
        "vmm_private",
        "VMM OWN",
        "QEMU's memory, neither RAM nor segment, that no other process maps, in memory or swap.",
    ),
    Column(
        "vmm_shared",
        "VMM SHARED",
        "QEMU's memory, neither RAM nor segment, that other processes map too: its program, "
        "libraries, merged pages; the total counts a page once for each guest that maps it.",
    ),
    Column(
        "pss_total",
        "PROPORTIONAL",
        "All the guest's pages in memory, each divided by the number of processes that map it; "
        "the total counts every page once, if only these guests map it.",
    ),
    Column("page_tables", "PAGE TABLES", "The kernel's page tables for the QEMU process."),
    Column(
        "ksm",
        "KSM",
        "Pages of RAM and VMM that KSM merged; the total counts a page once for each place.",
    ),
    Column("note", "NOTE", "Why figures are unknown.", is_bytes=False, summed=False),
)

BLOB_COLUMNS = (
    Column("name", "NAME", "The segment's name; RAM has its guests' names.", is_bytes=False),
    Column("kind", "KIND", "segment, or ram: a file that backs RAM.", is_bytes=False),
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
        "Guests of this report that map it.",
        is_bytes=False,
    ),
)


class Blob(msgspec.Struct, frozen=True):
    """One file that guests map; ``BLOB_COLUMNS`` says what each field counts; None is unknown."""

    name: str
    kind: str
    path: str
    size: int | None
    resident: int | None
    guests: int | None


class Report(msgspec.Struct, frozen=True):
    """Accounts of all guests, and the files they share."""

    guests: tuple[GuestAccount, ...]
    blobs: tuple[Blob, ...]

    @property
    def totals(self) -> dict[str, int | None]:
        """Bytes per summed column; None when one guest's figure is unknown."""
        return {
            column.key: _sum(value(guest, column) for guest in self.guests)
            for column in COLUMNS
            if column.summed
        }

    @property
    def resident(self) -> int | None:
        """Bytes of all blobs in the page cache, each page once; None when one is unknown."""
        return _sum(blob.resident for blob in self.blobs)

    def to_json(self) -> dict[str, object]:
        """The report as JSON values; null is unknown, and these fields are stable.

        ``version`` (``JSON_VERSION``); ``guests``: one object per guest with the keys of
        ``COLUMNS`` and ``ram_path``, where ``segments`` is a list of ``name``, ``path``,
        ``mapped``, ``resident`` (bytes); ``blobs``: one object per file with the keys of
        ``BLOB_COLUMNS``; ``totals``: the sums over guests; ``blobs_resident``: the sum over blobs.
        """
        return {
            "version": JSON_VERSION,
            "guests": [msgspec.to_builtins(guest) for guest in self.guests],
            "blobs": [msgspec.to_builtins(blob) for blob in self.blobs],
            "totals": self.totals,
            "blobs_resident": self.resident,
        }


def value(guest: GuestAccount, column: Column) -> int | None:
    """A guest's figure in a column that is counted in bytes; None when unknown."""
    if column.key == "segments":
        return None if guest.segments is None else sum(s.resident for s in guest.segments)
    figure: int | None = getattr(guest, column.key)
    return figure


def collect(guests: Iterable[GuestMaps], root: Path = files.ROOT) -> Report:
    """Read the kernel's figures for all ``guests``.

    Guests that end meanwhile are left out. Raises Incompatible on a kernel without smaps.
    """
    known = list(guests)
    # Half of the time is the kernel's, which counts for several at once.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(partial(_measured, root=root), known)
        accounts = [account for account in found if account]
    return Report(tuple(accounts), tuple(_blobs(known, accounts, root)))


def _measured(maps: GuestMaps, root: Path) -> GuestAccount | None:
    with suppress(NotFound):
        return measure(maps, root)
    return None


def _blobs(known: Iterable[GuestMaps], accounts: list[GuestAccount], root: Path) -> list[Blob]:
    alive = {account.pid for account in accounts}
    segments: dict[str, str] = {}
    ram: dict[str, list[str]] = {}
    for maps in known:
        if maps.pid not in alive:
            continue
        segments.update((maps.file(path), name) for path, name in maps.segments.items())
        # A memfd is no file that others could map by its path; guests' memfds bear one name.
        if maps.ram_path is not None and not maps.ram_path.startswith("/memfd:"):
            ram.setdefault(maps.ram_path, []).append(maps.name)
    found = [
        _blob(name, "segment", path, _mapping_guests(path, accounts), root)
        for path, name in sorted(segments.items())
    ]
    found += [
        _blob(", ".join(names), "ram", path, len(names), root)
        for path, names in sorted(ram.items())
    ]
    return found


def _mapping_guests(path: str, accounts: list[GuestAccount]) -> int | None:
    uses = [account.segments for account in accounts]
    return _sum(
        None if use is None else sum(s.path == path and s.mapped > 0 for s in use) for use in uses
    )


def _blob(name: str, kind: str, path: str, guests: int | None, root: Path) -> Blob:
    """The file's own figures; a file that is gone or closed to this user has none."""
    real = root / path.lstrip("/")
    size = resident = None
    with suppress(OSError, NotFound, NotPermitted):
        size = real.stat().st_size
        resident = residency.resident_bytes(real)
    return Blob(name, kind, path, size, resident, guests)


def _sum(figures: Iterable[int | None]) -> int | None:
    """The sum; None when one figure is unknown."""
    total = 0
    for figure in figures:
        if figure is None:
            return None
        total += figure
    return total
