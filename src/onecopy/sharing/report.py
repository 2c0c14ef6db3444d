"""Many guests side by side, and what they have in common counted once.

``COLUMNS`` and ``BLOB_COLUMNS`` declare every figure once: tables, JSON and documentation come
from them. Not here: one guest's account (``account``), and printing (``onecopy.cli``).
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator, Sequence
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
        "Segment pages that this guest has mapped in; the total counts a page once for each "
        "guest that maps it, the blob's resident bytes count it once.",
    ),
    Column(
        "segments_private",
        "SEG OWN",
        "The guest's own copies of segment pages, in memory or swap: what it wrote to them.",
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
    Column("swapped", "SWAPPED", "What of all this is in swap."),
    Column("huge", "HUGE", "What of all this is in huge pages, anonymous, of files or hugetlb."),
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
        "Guests that map it.",
        is_bytes=False,
    ),
    Column("others", "OTHERS", "Other QEMU processes that map it.", is_bytes=False),
)


class Blob(msgspec.Struct, frozen=True):
    """One file that guests map; ``BLOB_COLUMNS`` says what each field counts; None is unknown."""

    name: str
    kind: str
    path: str
    size: int | None
    resident: int | None
    guests: int | None
    others: int | None


class Report(msgspec.Struct, frozen=True):
    """Accounts of all guests, and the files they share."""

    guests: tuple[GuestAccount, ...]
    blobs: tuple[Blob, ...]
    #: Other QEMU processes of the host.
    others: tuple[GuestAccount, ...] = ()

    @property
    def totals(self) -> dict[str, int | None]:
        """Bytes per summed column over ``guests``; None when one's figure is unknown."""
        return totals(self.guests)

    @property
    def resident(self) -> int | None:
        """Bytes of the guests' blobs in the page cache, each page once; None when one is unknown.

        What only others map is not in it.
        """
        return _sum(blob.resident for blob in self.blobs if blob.guests != 0)

    def to_json(self) -> dict[str, object]:
        """The report as JSON values; null is unknown, and these fields are stable.

        ``version`` (``JSON_VERSION``); ``guests``: one object per guest with the keys of
        ``COLUMNS`` and ``ram_path``, where ``segments`` is a list of the fields of ``SegmentUse``;
        ``others``: the same of other QEMU processes; ``blobs``: one object per file with the keys
        of ``BLOB_COLUMNS``; ``totals``: the sums over guests; ``blobs_resident``: the sum over the
        blobs that guests map.
        """
        return {
            "version": JSON_VERSION,
            "guests": [msgspec.to_builtins(guest) for guest in self.guests],
            "others": [msgspec.to_builtins(guest) for guest in self.others],
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


def totals(guests: Iterable[GuestAccount]) -> dict[str, int | None]:
    """Sums over some guests: bytes per summed column; None when one figure is unknown."""
    known = list(guests)
    return {
        column.key: _sum(value(guest, column) for guest in known)
        for column in COLUMNS
        if column.summed
    }


def collect(
    guests: Iterable[GuestMaps], others: Iterable[GuestMaps] = (), *, root: Path = files.ROOT
) -> Report:
    """Read the kernel's figures for all ``guests``, and for ``others`` beside them.

    Those that end meanwhile are left out. Raises Incompatible on a kernel without smaps.
    """
    known, beside = list(guests), list(others)
    every = [*known, *beside]
    # Half of the time is the kernel's, which counts for several at once.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(zip(every, pool.map(partial(_measured, root=root), every), strict=True))
    alive = [(maps, account) for maps, account in found if account]
    pids = {maps.pid for maps in known}
    return Report(
        tuple(account for maps, account in alive if maps.pid in pids),
        tuple(_blobs(alive, pids, root)),
        tuple(account for maps, account in alive if maps.pid not in pids),
    )


def _measured(maps: GuestMaps, root: Path) -> GuestAccount | None:
    with suppress(NotFound):
        return measure(maps, root)
    return None


def _blobs(
    alive: Sequence[tuple[GuestMaps, GuestAccount]], pids: Container[int], root: Path
) -> Iterator[Blob]:
    """The files that these map; ``pids`` are the guests', the rest is others'."""
    segments: dict[str, str] = {}
    ram: dict[str, list[GuestMaps]] = {}
    for maps, _ in alive:
        segments.update((maps.file(path), name) for path, name in maps.segments.items())
        if maps.ram_path is not None and _is_file(maps.ram_path, root):
            ram.setdefault(maps.ram_path, []).append(maps)
    accounts = [account for _, account in alive]
    both = [a for a in accounts if a.pid in pids], [a for a in accounts if a.pid not in pids]
    for path, name in sorted(segments.items()):
        guests, others = (_mapping_guests(path, some) for some in both)
        yield _blob(name, "segment", path, guests, others, root)
    for path, users in sorted(ram.items()):
        names = ", ".join(maps.name for maps in users)
        guests = sum(maps.pid in pids for maps in users)
        yield _blob(names, "ram", path, guests, len(users) - guests, root)


def _is_file(path: str, root: Path) -> bool:
    """Whether others could map it by its path: no memfd, whose name many have, and no folder."""
    return not path.startswith("/memfd:") and not (root / path.lstrip("/")).is_dir()


def _mapping_guests(path: str, accounts: list[GuestAccount]) -> int | None:
    uses = [account.segments for account in accounts]
    return _sum(
        None if use is None else sum(s.path == path and s.mapped > 0 for s in use) for use in uses
    )


def _blob(
    name: str, kind: str, path: str, guests: int | None, others: int | None, root: Path
) -> Blob:
    """The file's own figures; a file that is gone or closed to this user has none."""
    real = root / path.lstrip("/")
    size = resident = None
    with suppress(OSError, NotFound, NotPermitted):
        size = real.stat().st_size
        resident = residency.resident_bytes(real)
    return Blob(name, kind, path, size, resident, guests, others)


def _sum(figures: Iterable[int | None]) -> int | None:
    """The sum; None when one figure is unknown."""
    total = 0
    for figure in figures:
        if figure is None:
            return None
        total += figure
    return total
