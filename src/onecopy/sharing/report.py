"""Many guests side by side, and what they have in common counted once.

``COLUMNS`` and ``BLOB_COLUMNS`` declare every figure once: tables, JSON and documentation come
from them. Not here: one guest's account (``account``), and printing (``onecopy.cli``).
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

#: Grows when a field of ``Report.to_json`` changes its meaning or goes; new fields do not count.
JSON_VERSION = 1
#: How long one process, or one file, may keep us waiting, in seconds.
_PATIENCE = 5.0


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
    #: What could not be looked at at all, one sentence each.
    left_out: tuple[str, ...] = ()

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
        blobs that guests map; ``left_out``: what could not be looked at, one sentence each.
        """
        return {
            "version": JSON_VERSION,
            "guests": [msgspec.to_builtins(guest) for guest in self.guests],
            "others": [msgspec.to_builtins(guest) for guest in self.others],
            "blobs": [msgspec.to_builtins(blob) for blob in self.blobs],
            "totals": self.totals,
            "blobs_resident": self.resident,
            "left_out": list(self.left_out),
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
    guests: Iterable[GuestMaps],
    others: Iterable[GuestMaps] = (),
    *,
    left_out: Sequence[str] = (),
    root: Path = files.ROOT,
) -> Report:
    """Read the kernel's figures for all ``guests``, and for ``others`` beside them.

    Those that end meanwhile are left out; of those that cannot be looked at nothing is known but
    why. ``left_out`` is passed on. Raises Incompatible on a kernel without smaps.
    """
    known, beside = list(guests), list(others)
    every = [*known, *beside]
    measured = partial(_measured, root=root)
    # Half of the time is the kernel's, which counts for several at once.
    accounts = bounded_wait.each(
        measured, every, _late, seconds=_PATIENCE, at_once=os.cpu_count() or 1
    )
    alive = [(maps, account) for maps, account in zip(every, accounts, strict=True) if account]
    pids = {maps.pid for maps in known}
    return Report(
        tuple(account for maps, account in alive if maps.pid in pids),
        tuple(_blobs(alive, pids, root)),
        tuple(account for maps, account in alive if maps.pid not in pids),
        tuple(left_out),
    )


def _measured(maps: GuestMaps, root: Path) -> GuestAccount | None:
    with suppress(NotFound):
        return measure(maps, root)
    return None


def _late(maps: GuestMaps) -> GuestAccount:
    return unreadable(maps, "the process kept us waiting for its memory map")


def _blobs(
    alive: Sequence[tuple[GuestMaps, GuestAccount]], pids: Container[int], root: Path
) -> list[Blob]:
    """The files that these map; ``pids`` are the guests', the rest is others'."""
    segments: dict[str, str] = {}
    ram: dict[str, list[GuestMaps]] = {}
    which: dict[str, files.Identity | None] = {}
    for maps, _ in alive:
        for path, name in maps.segments.items():
            # What others call it comes after what we do.
            if _is_known(maps, path):
                which.setdefault(maps.file(path), _identity(maps, path))
                segments.setdefault(maps.file(path), name)
        if backing := _shared_ram(maps, root):
            which.setdefault(backing, _identity(maps, backing))
            ram.setdefault(backing, []).append(maps)
    both = [a for a in alive if a[0].pid in pids], [a for a in alive if a[0].pid not in pids]
    hidden = any(account.segments is None for _, account in both[1])
    found = []
    for path, name in sorted(segments.items()):
        guests, others = (_mapping_guests(path, some) for some in both)
        found.append(Blob(name, "segment", path, None, None, guests, others))
    for path, users in sorted(ram.items()):
        names = ", ".join(maps.name for maps in users)
        guests = sum(maps.pid in pids for maps in users)
        others = None if hidden else len(users) - guests
        found.append(Blob(names, "ram", path, None, None, guests, others))
    measured = partial(_with_sizes, which=which, root=root)
    return bounded_wait.each(measured, found, lambda blob: blob, seconds=_PATIENCE)


def _shared_ram(maps: GuestMaps, root: Path) -> str | None:
    """The file of its RAM if others could map it by its path.

    That is no memfd, whose name many have, and no folder.
    """
    path = maps.ram_path
    if path is None or path.startswith("/memfd:") or not _is_known(maps, path):
        return None
    # What others have was looked at.
    return None if maps.regular is None and _is_folder(root / path.lstrip("/")) else path


def _is_folder(path: Path) -> bool:
    with suppress(OSError):
        return path.is_dir()
    return False


def _identity(maps: GuestMaps, path: str) -> files.Identity | None:
    return None if maps.regular is None else maps.regular[path]


def _mapping_guests(path: str, some: Sequence[tuple[GuestMaps, GuestAccount]]) -> int | None:
    return _sum(
        None
        if account.segments is None
        else sum(
            use.path == path and use.mapped > 0 and _is_known(maps, path)
            for use in account.segments
        )
        for maps, account in some
    )


def _is_known(maps: GuestMaps, path: str) -> bool:
    """Whether what others have under this name is the regular file that has it here, too."""
    return maps.regular is None or path in maps.regular


def _with_sizes(blob: Blob, which: Mapping[str, files.Identity | None], root: Path) -> Blob:
    """With the file's own figures; a file that is gone or closed to this user has none."""
    real, same_as = root / blob.path.lstrip("/"), which[blob.path]
    with suppress(OSError, NotFound, NotPermitted, InvalidInput):
        found = real.stat()
        if same_as in (None, (found.st_dev, found.st_ino)):
            blob = replace(blob, size=found.st_size)
            blob = replace(blob, resident=residency.resident_bytes(real, same_as))
    return blob


def _sum(figures: Iterable[int | None]) -> int | None:
    """The sum; None when one figure is unknown."""
    total = 0
    for figure in figures:
        if figure is None:
            return None
        total += figure
    return total
