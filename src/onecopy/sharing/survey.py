"""Scan many guests one after another and find what they could share.

Not here: one guest (``ram_scan``), files (``file_pages``), and the figures (``advice``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from onecopy.errors import Incompatible, NotFound, NotPermitted, Unreadable
from onecopy.linux import bounded_wait
from onecopy.linux.counters import meminfo
from onecopy.sharing import file_pages
from onecopy.sharing.account import GuestMaps
from onecopy.sharing.advice import Advice, advise
from onecopy.sharing.file_pages import Contents, Image
from onecopy.sharing.ram_scan import Scan, scan

#: Seconds to wait for a part of one process's memory.
_PATIENCE = 5.0
_LATE = "reading its memory took too long"


class LeftOut(msgspec.Struct, frozen=True):
    """A guest that was not scanned."""

    name: str
    pid: int
    reason: str


class Sources(msgspec.Struct, frozen=True):
    """Files to compare with the guests' memory."""

    root_images: Sequence[Image] = ()
    root_trees: Sequence[Path] = ()
    images: Sequence[Image] = ()
    trees: Sequence[Path] = ()


class Survey(msgspec.Struct, frozen=True):
    """The result, and what it cost."""

    advice: Advice
    left_out: tuple[LeftOut, ...]
    cpu_seconds: float
    """CPU time for reading and hashing ``advice.own``; KSM needs as much in each pass."""
    compared: int
    """Bytes of files that guests were compared with."""


def survey(
    guests: Sequence[GuestMaps], sources: Sources, tell: Callable[[str], None] = lambda _: None
) -> Survey:
    """Scan guests and compare them.

    Args:
        tell: receives progress messages.

    Raises:
        NotFound: a directory does not exist.
        InvalidInput: it is not a directory.
    """
    scans: list[Scan] = []
    left_out = []
    root = _contents(sources.root_images, sources.root_trees, tell)
    extra = _contents(sources.images, sources.trees, tell)
    began = time.process_time()
    budget = [2 * (meminfo.read().total or 0)]
    one = partial(_scan, budget=budget, tell=tell)
    looked = bounded_wait.each(one, guests, lambda _: _LATE, seconds=_PATIENCE)
    for maps, found in zip(guests, looked, strict=True):
        if isinstance(found, Scan):
            scans.append(found)
        else:
            left_out.append(LeftOut(maps.name, maps.pid, found))
    spent = time.process_time() - began
    tell("comparing")
    known = [sum(each.sizes) for each in (root, extra) if each]
    return Survey(advise(scans, root, extra), tuple(left_out), spent, sum(known))


def _scan(maps: GuestMaps, budget: list[int], tell: Callable[[str], None]) -> Scan | str:
    """Scan one guest, or return why it is left out.

    Many processes can show the same memory as if each had it. So the total is limited to twice the
    host's memory.
    """
    tell(f"reading the memory of {maps.name}")
    if budget[0] <= 0:
        return "the guests before it had twice as much memory as the host"
    try:
        found = scan(maps)
    except (NotFound, NotPermitted, Incompatible, Unreadable) as error:
        return error.message
    budget[0] -= found.own
    return found


def _contents(
    images: Sequence[Image], trees: Sequence[Path], tell: Callable[[str], None]
) -> Contents | None:
    names = [*(image.name for image in images), *map(str, trees)]
    if not names:
        return None
    tell(f"reading {', '.join(dict.fromkeys(names))}")
    return file_pages.of(images, trees)
