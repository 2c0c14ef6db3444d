"""What stands in files, page by page, so that pages of guests can be told to be theirs.

A guest's page cache has a file's pages as they are, the last one filled up with zeroes; which are
the same 4096 bytes that a segment with this file has. Images (segments, disks) are looked at whole,
without knowing their file systems: all that lies in them at a page's boundary is found. Not here:
guests' pages (``scan``), and who has them in common (``advice``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from onecopy.errors import InvalidInput, NotFound, NotPermitted
from onecopy.linux import bounded_wait
from onecopy.linux.files import Identity, open_regular
from onecopy.linux.sparse import data_ranges
from onecopy.model import PAGE_SIZE
from onecopy.sharing.ram_scan import ZERO, Hashes, Numbers, hash_pages

#: Read at once, in pages.
_CHUNK = 1024
#: How long one read may keep us waiting, in seconds.
_PATIENCE = 30.0


class Contents(msgspec.Struct, frozen=True):
    """The pages of some files."""

    hashes: Hashes
    """Ascending, each once; a page of zeroes is nobody's and not among them."""
    owners: Numbers
    """For each of them the number in ``names`` of the first file that has it."""
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """Bytes of each file's pages."""

    def find(self, hashes: Hashes) -> Numbers:
        """For each of ``hashes`` the number of the file that has it, or -1."""
        if not len(self.hashes):
            return np.full(len(hashes), -1)
        at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.where(self.hashes[at] == hashes, self.owners[at], -1)


class Image(msgspec.Struct, frozen=True):
    """A file to be looked at whole."""

    name: str
    path: Path
    same_as: Identity | None = None
    """Which file it was when it was chosen: another that has its name by now is left out."""


def of(images: Sequence[Image], folders: Sequence[Path] = ()) -> Contents:
    """Images, and all regular files below ``folders``, by their paths there.

    Links are not followed there; what cannot be read is left out. Raises NotFound, InvalidInput for
    a folder.
    """
    below = (image for folder in folders for image in _files(folder))
    return _collect([*images, *below])


def _files(folder: Path) -> Iterator[Image]:
    if not folder.exists():
        raise NotFound(f"there is no {folder}", hint="name a folder with the files to look for")
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is not a folder", hint="name the folder that has the files")
    # Not by recursion, of which Python allows less than a file system does.
    left = [str(folder)]
    while left:
        with suppress(OSError), os.scandir(left.pop()) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                if entry.is_dir(follow_symlinks=False):
                    left.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    found = entry.stat(follow_symlinks=False)
                    yield Image(entry.path, Path(entry.path), (found.st_dev, found.st_ino))


def _collect(images: Sequence[Image]) -> Contents:
    # A file system may be a program, and keep us waiting.
    found = bounded_wait.each(_hashed, images, lambda _: None, seconds=_PATIENCE)
    known = [number for number, part in enumerate(found) if part is not None]
    parts = [part for part in found if part is not None]
    every = np.concatenate([np.empty(0, np.uint64), *parts])
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    # The first of equal ones comes first: the sort behind it is stable.
    unique, first = np.unique(every, return_index=True)
    new = unique != ZERO
    return Contents(
        hashes=unique[new],
        owners=owners[first][new],
        names=tuple(images[number].name for number in known),
        sizes=tuple(len(part) * PAGE_SIZE for part in parts),
    )


def _hashed(image: Image) -> Hashes | None:
    with suppress(OSError, NotFound, NotPermitted, InvalidInput):
        return hash_file(image.path, image.same_as)
    return None


def hash_file(path: Path, same_as: Identity | None = None) -> Hashes:
    """The contents of a file's pages, holes left out. Raises OSError, and as `open_regular`."""
    parts = [np.empty(0, np.uint64)]
    fd = open_regular(path, same_as)
    try:
        for start, end in data_ranges(fd, os.fstat(fd).st_size):
            parts.extend(_hash_range(fd, start - start % PAGE_SIZE, end))
    finally:
        os.close(fd)
    return np.concatenate(parts)


def _hash_range(fd: int, start: int, end: int) -> Iterator[Hashes]:
    for at in range(start, end, _CHUNK * PAGE_SIZE):
        data = os.pread(fd, min(end - at, _CHUNK * PAGE_SIZE), at)
        bounded_wait.going_on()
        whole = data + bytes(-len(data) % PAGE_SIZE)
        yield hash_pages(np.frombuffer(whole, np.uint8).reshape(-1, PAGE_SIZE))
