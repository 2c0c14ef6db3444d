"""What guests have in common, what each way of sharing would save, and which ways to choose.

A saved page is a copy that disappears. One of several equal pages always remains: merged by KSM, in
the page cache of a segment, or in the file of a saved system. So each figure is memory that the
host would get back. A page that two ways would save counts for both, and in their overlap.

The functions are pure: they turn scans (``ram_scan``) and files (``file_pages``) into figures.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from onecopy.model import MIB, PAGE_SIZE
from onecopy.sharing.file_pages import Contents
from onecopy.sharing.ram_scan import ZERO, Hashes, Marks, Numbers, Scan

#: A way is not worthwhile if it saves less than this: bytes, and a share of the guests' own memory.
_MINIMUM, _MINIMUM_SHARE = 16 * MIB, 0.02
#: A further way is not worthwhile if it adds less than this share of the possible savings.
_MINIMUM_GAIN = 0.1
#: The number of guests, largest first, that are tried as the origin of the saved system.
_CANDIDATES = 8
#: The number of files listed in the advice.
_FILES = 20
_SPREAD = np.uint64(0x9E3779B97F4A7C15)

#: The ways and their descriptions, in the order of their bits in ``_Table.ways``.
WAYS = {
    "root": "a root segment: the guests' own images, executed in place",
    "extra": "an extra segment with the named files",
    "saved": "a saved system: all guests start from one of them",
    "ksm": "KSM: equal pages are merged while the guests run",
}
#: The kinds of pages; each page is of the first kind that applies.
KINDS = {
    "zero": "zeroes only",
    "file": "pages of files: of the guests' images or of the named files",
    "place": "equal at the same place in several guests: their kernel, or their state when saved",
    "equal": "equal to another page of this guest or of others",
    "unique": "different from all others",
}


class Way(msgspec.Struct, frozen=True):
    """The savings of one way of sharing, in bytes."""

    name: str
    saves: int
    alone: int
    """The part that no other way saves."""


class FileFound(msgspec.Struct, frozen=True):
    """A file of whose pages guests have copies."""

    name: str
    copies: int
    """Bytes of the copies in all guests."""
    guests: int
    """The number of guests with copies."""


class Looked(msgspec.Struct, frozen=True):
    """A guest that was scanned; sizes in bytes, the fields of `Scan`."""

    name: str
    pid: int
    ram_size: int
    own: int
    shared: int
    merged: int | None
    swapped: int
    missed: int
    note: str


class Advice(msgspec.Struct, frozen=True):
    """The result of a comparison; all figures are bytes."""

    guests: tuple[Looked, ...]
    own: int
    """The guests' own pages: those that were compared."""
    kinds: dict[str, int]
    """``own`` by kind, as in ``KINDS``."""
    ways: tuple[Way, ...]
    overlaps: dict[str, int]
    """Ways joined by ``+`` -> bytes that exactly these would save; each page is in one entry."""
    possible: int
    """The savings of all ways together."""
    files: tuple[FileFound, ...]
    """The files with the most copies."""
    best_guest: str | None
    """The guest from which a saved system would save most."""
    take: tuple[str, ...]
    """The ways to choose; none if nothing is worthwhile."""
    reason: str


class _Table(msgspec.Struct, frozen=True):
    """One row for each page of all guests, ordered by content, then by guest."""

    guests: Numbers
    kinds: Numbers
    ways: Numbers
    files: Numbers


def advise(
    scans: Sequence[Scan], root: Contents | None = None, extra: Contents | None = None
) -> Advice:
    """Compare guests with each other and with files.

    Args:
        root: the pages of the guests' images; None if unknown.
        extra: the pages of other files that a segment could contain; None if unknown.

    Returns:
        The advice, without the ways whose files are unknown.
    """
    best = _best_guest(scans)
    ordered = [*scans[best : best + 1], *scans[:best], *scans[best + 1 :]]
    known = {"root": root, "extra": extra}
    names = [name for name in WAYS if known.get(name, root) is not None or name not in known]
    table = _table(ordered, root, extra)
    sizes = np.bincount(table.ways, minlength=1 << len(WAYS)) * PAGE_SIZE
    ways = tuple(_way(name, sizes) for name in names)
    own = len(table.ways) * PAGE_SIZE
    possible = int(sizes[1:].sum())
    take, reason = _choose(sizes, names, own)
    kinds = np.bincount(table.kinds, minlength=len(KINDS)) * PAGE_SIZE
    return Advice(
        guests=tuple(_looked(scan) for scan in scans),
        own=own,
        kinds=dict(zip(KINDS, map(int, kinds), strict=True)),
        ways=ways,
        overlaps={_join_names(code): int(size) for code, size in enumerate(sizes) if code and size},
        possible=possible,
        files=_files(table, root, extra),
        best_guest=scans[best].name if len(scans) > 1 else None,
        take=take,
        reason=reason,
    )


def _looked(scan: Scan) -> Looked:
    return Looked(**{name: getattr(scan, name) for name in Looked.__struct_fields__})


def _way(name: str, sizes: npt.NDArray[np.int64]) -> Way:
    bit = _bit(name)
    codes = np.arange(len(sizes))
    return Way(name, int(sizes[(codes & bit) != 0].sum()), int(sizes[bit]))


def _bit(name: str) -> int:
    return 1 << list(WAYS).index(name)


def _join_names(code: int) -> str:
    return "+".join(name for name in WAYS if code & _bit(name))


def _best_guest(scans: Sequence[Scan]) -> int:
    """Return the index of the guest whose pages the others have most of."""
    tried = sorted(range(len(scans)), key=lambda n: -scans[n].own)[:_CANDIDATES]
    contents = {n: np.unique(scans[n].hashes) for n in tried}

    def covered(number: int) -> int:
        mine = contents[number]
        others = (scan.hashes for n, scan in enumerate(scans) if n != number)
        return sum(int(np.count_nonzero(_among(other, mine))) for other in others)

    return max(tried, key=covered, default=0)


def _among(hashes: Hashes, known: Hashes) -> Marks:
    """Return which of ``hashes`` are in ``known``, which is sorted."""
    if not len(known):
        return np.zeros(len(hashes), np.bool_)
    found: Marks = known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes
    return found


def _table(scans: Sequence[Scan], root: Contents | None, extra: Contents | None) -> _Table:
    """Build the table; the first of ``scans`` is the origin of the saved system."""
    hashes = np.concatenate([np.empty(0, np.uint64), *(scan.hashes for scan in scans)])
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    guests = np.repeat(np.arange(len(scans)), [len(scan.hashes) for scan in scans])[order]
    pages = np.concatenate([np.empty(0, np.int64), *(scan.pages for scan in scans)])[order]
    mergeable = np.concatenate([np.empty(0, np.bool_), *(s.mergeable for s in scans)])[order]

    begins = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
    group = np.cumsum(begins) - 1
    in_root, in_extra = (
        np.full(len(hashes), -1) if files is None else files.find(hashes) for files in (root, extra)
    )
    ways = (
        ((in_root >= 0) & ~begins) * _bit("root")
        + ((in_extra >= 0) & ~begins) * _bit("extra")
        + _in_saved(guests, begins, group) * _bit("saved")
        + (mergeable & (_before(mergeable, begins) > 0)) * _bit("ksm")
    )
    counts = np.bincount(group)[group] if len(group) else group
    marks = [
        hashes == ZERO,
        (in_root >= 0) | (in_extra >= 0),
        _at_one_place(hashes, pages),
        counts > 1,
    ]
    files = np.where(in_extra >= 0, in_extra + (0 if root is None else len(root.names)), in_root)
    return _Table(guests, np.select(marks, range(4), 4), ways, files)


def _before(marks: Marks, begins: Marks) -> Numbers:
    """Count the marked rows before each row in its group."""
    before: Numbers = np.cumsum(marks) - marks
    starts = np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))
    counted: Numbers = before - before[starts]
    return counted


def _in_saved(guests: Numbers, begins: Marks, group: Numbers) -> Marks:
    """Mark pages of other guests that the first guest has as often."""
    first = guests == 0
    has = np.bincount(group, weights=first).astype(np.int64)[group] if len(group) else group
    each = begins | np.append(True, guests[1:] != guests[:-1])[: len(guests)]
    found: Marks = ~first & (_before(np.ones(len(guests), np.bool_), each) < has)
    return found


def _at_one_place(hashes: Hashes, pages: Numbers) -> Marks:
    """Mark pages that another guest has at the same place; each guest has one page per place."""
    _, where, counts = np.unique(
        hashes ^ (pages.astype(np.uint64) * _SPREAD), return_inverse=True, return_counts=True
    )
    found: Marks = counts[where] > 1
    return found


def _files(table: _Table, root: Contents | None, extra: Contents | None) -> tuple[FileFound, ...]:
    names = [name for files in (root, extra) if files for name in files.names]
    known = table.files >= 0
    files, guests = table.files[known], table.guests[known]
    copies = np.bincount(files, minlength=len(names))
    users = np.bincount(np.unique(files * len(table.guests) + guests) // max(len(table.guests), 1))
    most = sorted(np.flatnonzero(copies), key=lambda n: -copies[n])[:_FILES]
    return tuple(FileFound(names[n], int(copies[n]) * PAGE_SIZE, int(users[n])) for n in most)


def _choose(
    sizes: npt.NDArray[np.int64], names: Sequence[str], own: int
) -> tuple[tuple[str, ...], str]:
    """Choose ways, and give the reasons.

    Segments and saved systems come first: they cost no CPU time and make starts faster. KSM is
    considered for the rest.
    """
    codes = np.arange(len(sizes))

    def saved(chosen: Sequence[str]) -> int:
        mask = sum(_bit(name) for name in chosen)
        return int(sizes[(codes & mask) != 0].sum())

    possible = saved(names)
    if possible < max(_MINIMUM, _MINIMUM_SHARE * own):
        return (), (f"all ways together would save {_mib(possible)} of {_mib(own)}: not worthwhile")
    chosen: list[str] = []
    reasons = []
    candidates = [name for name in names if name != "ksm"]
    while candidates:
        name = max(candidates, key=lambda n: saved([*chosen, n]))
        candidates.remove(name)
        adds = saved([*chosen, name]) - saved(chosen)
        if adds < _MINIMUM_GAIN * possible:
            reasons.append(f"{name} would add {_mib(adds)}: not worthwhile")
            continue
        chosen.append(name)
        reasons.append(f"{name} saves {_mib(adds)} and costs no CPU time")
    adds = saved([*chosen, "ksm"]) - saved(chosen)
    if adds >= _MINIMUM_GAIN * possible:
        chosen.append("ksm")
        reasons.append(f"ksm saves {_mib(adds)} that nothing else saves, but costs CPU time")
    else:
        reasons.append(f"ksm would add {_mib(adds)}: not worth its CPU time")
    return tuple(chosen), f"{_mib(possible)} of {_mib(own)} can be saved; " + "; ".join(reasons)


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"
