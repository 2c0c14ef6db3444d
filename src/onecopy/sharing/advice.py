"""What guests have in common, what each way of sharing would save of it, and which to take.

Each page that some way would save is a copy that goes: of equal pages one always stays, with KSM
merged, with a segment in the host's page cache, with a saved system in its file. So what is said to
be saved is what the host gets back, and a page that two ways would save is counted by both, and in
their overlap. Pure: scans (``scan``) and files (``contents``) go in, figures come out.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from onecopy.model import MIB, PAGE_SIZE
from onecopy.sharing.file_pages import Contents
from onecopy.sharing.ram_scan import ZERO, Hashes, Marks, Numbers, Scan

#: A way is not worth its trouble below these: bytes, and a share of what guests have alone.
_LEAST, _LEAST_SHARE = 16 * MIB, 0.02
#: Nor is a second one that adds less than this share of what can be saved.
_ADDS = 0.1
#: Guests from which the saved system may be made, tried in turn: the largest ones.
_CANDIDATES = 8
#: Files that are named.
_FILES = 20
_SPREAD = np.uint64(0x9E3779B97F4A7C15)

#: The ways, and what each is; they are bits of ``_Table.ways`` in this order.
WAYS = {
    "root": "a root segment: the guests' own images, executed in place",
    "extra": "an extra segment with the files that were named",
    "saved": "a saved system: all guests started from one of them",
    "ksm": "KSM: equal pages merged while the guests run",
}
#: What pages are, each page one of these, the first that holds.
KINDS = {
    "zero": "nothing but zeroes",
    "file": "pages of files: of the guests' images, or those that were named",
    "place": "equal at the same place of several guests: their kernel, or what they had when saved",
    "equal": "equal to another page, of this guest or of others",
    "unique": "like no other",
}


class Way(msgspec.Struct, frozen=True):
    """What one way of sharing saves, in bytes."""

    name: str
    saves: int
    alone: int
    """What no other way saves."""


class FileFound(msgspec.Struct, frozen=True):
    """A file whose pages guests have copies of."""

    name: str
    copies: int
    """Bytes of its pages in all guests together."""
    guests: int
    """How many guests have some."""


class Looked(msgspec.Struct, frozen=True):
    """A guest that was looked at, in bytes; the fields of `Scan`."""

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
    """All figures are bytes."""

    guests: tuple[Looked, ...]
    own: int
    """What guests have for themselves: the pages that were compared."""
    kinds: dict[str, int]
    """``own`` by what it is: ``KINDS``."""
    ways: tuple[Way, ...]
    overlaps: dict[str, int]
    """What exactly these ways would save, joined by ``+``: each page stands in one of them."""
    possible: int
    """What all ways together would save."""
    files: tuple[FileFound, ...]
    """Those with most copies."""
    best_guest: str | None
    """From which the saved system would save most."""
    take: tuple[str, ...]
    """The ways to take; none if nothing is worth it."""
    reason: str


class _Table(msgspec.Struct, frozen=True):
    """One row for each page of all guests, sorted by content, then by guest."""

    guests: Numbers
    kinds: Numbers
    ways: Numbers
    files: Numbers


def advise(
    scans: Sequence[Scan], root: Contents | None = None, extra: Contents | None = None
) -> Advice:
    """Compare guests with each other and with files.

    ``root`` is what their images have, ``extra`` other files that a segment could have; None is not
    looked for, and what that way saves is then unknown and not among the ways.
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
        overlaps={_joined(code): int(size) for code, size in enumerate(sizes) if code and size},
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


def _joined(code: int) -> str:
    return "+".join(name for name in WAYS if code & _bit(name))


def _best_guest(scans: Sequence[Scan]) -> int:
    """The number of the guest whose pages the others have most of."""
    tried = sorted(range(len(scans)), key=lambda n: -scans[n].own)[:_CANDIDATES]
    contents = {n: np.unique(scans[n].hashes) for n in tried}

    def covered(number: int) -> int:
        mine = contents[number]
        others = (scan.hashes for n, scan in enumerate(scans) if n != number)
        return sum(int(np.count_nonzero(_among(other, mine))) for other in others)

    return max(tried, key=covered, default=0)


def _among(hashes: Hashes, known: Hashes) -> Marks:
    """Which of ``hashes`` are among ``known``, which is sorted."""
    if not len(known):
        return np.zeros(len(hashes), np.bool_)
    found: Marks = known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes
    return found


def _table(scans: Sequence[Scan], root: Contents | None, extra: Contents | None) -> _Table:
    """The first of ``scans`` is the guest that the saved system is made from."""
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
    """For each row, how many rows before it in its group are marked."""
    before: Numbers = np.cumsum(marks) - marks
    starts = np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))
    counted: Numbers = before - before[starts]
    return counted


def _in_saved(guests: Numbers, begins: Marks, group: Numbers) -> Marks:
    """Which pages of other guests the first guest has, too, as often."""
    first = guests == 0
    has = np.bincount(group, weights=first).astype(np.int64)[group] if len(group) else group
    each = begins | np.append(True, guests[1:] != guests[:-1])[: len(guests)]
    found: Marks = ~first & (_before(np.ones(len(guests), np.bool_), each) < has)
    return found


def _at_one_place(hashes: Hashes, pages: Numbers) -> Marks:
    """Which pages another guest has at the same place. A guest has one page at each place."""
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
    """Which ways to take, and why.

    Segments and saved systems come first: they cost no processor time and make starts faster. KSM
    is taken for what they leave.
    """
    codes = np.arange(len(sizes))

    def saved(chosen: Sequence[str]) -> int:
        mask = sum(_bit(name) for name in chosen)
        return int(sizes[(codes & mask) != 0].sum())

    possible = saved(names)
    if possible < max(_LEAST, _LEAST_SHARE * own):
        return (), (
            f"all ways together would save {_mib(possible)} of {_mib(own)}: not worth the trouble"
        )
    chosen: list[str] = []
    reasons = []
    candidates = [name for name in names if name != "ksm"]
    while candidates:
        name = max(candidates, key=lambda n: saved([*chosen, n]))
        candidates.remove(name)
        adds = saved([*chosen, name]) - saved(chosen)
        if adds < _ADDS * possible:
            reasons.append(f"{name} would add {_mib(adds)}: not worth it")
            continue
        chosen.append(name)
        reasons.append(f"{name} saves {_mib(adds)}, and costs no processor time")
    adds = saved([*chosen, "ksm"]) - saved(chosen)
    if adds >= _ADDS * possible:
        chosen.append("ksm")
        reasons.append(f"ksm saves {_mib(adds)} that nothing else does, for processor time")
    else:
        reasons.append(f"ksm would add {_mib(adds)}: not worth its processor time")
    return tuple(chosen), f"{_mib(possible)} of {_mib(own)} can be saved; " + "; ".join(reasons)


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"
