"""What stands in files, page by page, so that pages of guests can be told to be theirs.

A guest's page cache has a file's pages as they are, the last one filled up with zeroes; which are
the same 4096 bytes that a segment with this file has. Images (segments, disks) are looked at whole,
without knowing their file systems: all that lies in them at a page's boundary is found. Not here:
guests' pages (``scan``), and who has them in common (``advice``).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

import msgspec
import numpy as np

from onecopy.errors import InvalidInput, NotFound
from onecopy.host.sparse import data_ranges
from onecopy.model import PAGE_SIZE
from onecopy.sharing.scan import ZERO, Hashes, Numbers, hash_pages

#: Read at once, in pages.
_CHUNK = 1024


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


def of(images: Sequence[tuple[str, Path]], folders: Sequence[Path] = ()) -> Contents:
    """Images, (name, file) each, and all regular files below ``folders``, by their paths there.

    Links are not followed; what cannot be read is left out. Raises NotFound, InvalidInput for a
    folder.
    """
    below = ((str(path), path) for folder in folders for path in _files(folder))
    return _collect(chain(images, below))


def _files(folder: Path) -> Iterator[Path]:
    if not folder.exists():
        raise NotFound(f"there is no {folder}", hint="name a folder with the files to look for")
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is not a folder", hint="name the folder that has the files")
    for where, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(where, name)
            with suppress(OSError):
                if stat.S_ISREG(path.lstat().st_mode):
                    yield path


def _collect(named: Iterable[tuple[str, Path]]) -> Contents:
    names, sizes, parts = [], [], []
    for name, path in named:
        with suppress(OSError):
            hashes = hash_file(path)
            parts.append(hashes)
            names.append(name)
            sizes.append(len(hashes) * PAGE_SIZE)
    every = np.concatenate([np.empty(0, np.uint64), *parts])
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    # The first of equal ones comes first: the sort behind it is stable.
    unique, first = np.unique(every, return_index=True)
    known = unique != ZERO
    return Contents(unique[known], owners[first][known], tuple(names), tuple(sizes))


def hash_file(path: Path) -> Hashes:
    """The contents of a file's pages, holes left out. Raises OSError."""
    parts = [np.empty(0, np.uint64)]
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        for start, end in data_ranges(fd, os.fstat(fd).st_size):
            parts.extend(_hash_range(fd, start - start % PAGE_SIZE, end))
    finally:
        os.close(fd)
    return np.concatenate(parts)


def _hash_range(fd: int, start: int, end: int) -> Iterator[Hashes]:
    for at in range(start, end, _CHUNK * PAGE_SIZE):
        data = os.pread(fd, min(end - at, _CHUNK * PAGE_SIZE), at)
        whole = data + bytes(-len(data) % PAGE_SIZE)
        yield hash_pages(np.frombuffer(whole, np.uint8).reshape(-1, PAGE_SIZE))
