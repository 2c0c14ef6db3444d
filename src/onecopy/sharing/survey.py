"""Look at many guests, one after the other, and say what they could share.

Not here: one guest (``scan``), files (``contents``), the figures (``advice``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from onecopy.errors import Incompatible, NotFound, NotPermitted
from onecopy.sharing import contents
from onecopy.sharing.account import GuestMaps
from onecopy.sharing.advice import Advice, advise
from onecopy.sharing.contents import Contents
from onecopy.sharing.scan import Scan, scan


class LeftOut(msgspec.Struct, frozen=True):
    """A guest that was not looked at."""

    name: str
    pid: int
    reason: str


class Sources(msgspec.Struct, frozen=True):
    """Files in which to look for what guests have; (name, file) of images."""

    root_images: Sequence[tuple[str, Path]] = ()
    root_trees: Sequence[Path] = ()
    images: Sequence[tuple[str, Path]] = ()
    trees: Sequence[Path] = ()


class Survey(msgspec.Struct, frozen=True):
    """What was found, and what it took to look."""

    advice: Advice
    left_out: tuple[LeftOut, ...]
    cpu_seconds: float
    """Of this process for reading and hashing ``advice.own``: KSM does as much in each pass."""
    compared: int
    """Bytes of files that guests were compared with."""


def survey(
    guests: Sequence[GuestMaps], sources: Sources, tell: Callable[[str], None] = lambda _: None
) -> Survey:
    """Look at ``guests``; ``tell`` hears what is done. Raises NotFound, InvalidInput for a tree."""
    scans: list[Scan] = []
    left_out = []
    root = _contents(sources.root_images, sources.root_trees, tell)
    extra = _contents(sources.images, sources.trees, tell)
    began = time.process_time()
    for maps in guests:
        tell(f"reading the memory of {maps.name}")
        try:
            scans.append(scan(maps))
        except (NotFound, NotPermitted, Incompatible) as error:
            left_out.append(LeftOut(maps.name, maps.pid, error.message))
    spent = time.process_time() - began
    tell("comparing")
    known = [sum(each.sizes) for each in (root, extra) if each]
    return Survey(advise(scans, root, extra), tuple(left_out), spent, sum(known))


def _contents(
    images: Sequence[tuple[str, Path]], trees: Sequence[Path], tell: Callable[[str], None]
) -> Contents | None:
    names = [*(name for name, _ in images), *map(str, trees)]
    if not names:
        return None
    tell(f"reading {', '.join(dict.fromkeys(names))}")
    return contents.of(images, trees)
