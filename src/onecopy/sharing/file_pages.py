"""The pages of files, which identify pages of guests as copies of these.

A guest's page cache has the pages of a file, the last one padded with zeroes. A segment with the
file has the same 4096 bytes. Images (segments, disks) are read as a whole, without interpreting
their file systems: this finds everything that is aligned to pages.

Not here: guests' pages (``ram_scan``), and what they have in common (``advice``).
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

#: Pages read at once.
_CHUNK = 1024
#: Seconds to wait for one read.
_PATIENCE = 30.0


class Contents(msgspec.Struct, frozen=True):
    """The pages of some files."""

    hashes: Hashes
    """Ascending and unique; pages of zeroes are left out."""
    owners: Numbers
    """For each hash, the index in ``names`` of the first file that has it."""
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """The bytes of each file's pages."""

    def find(self, hashes: Hashes) -> Numbers:
        """Return for each of ``hashes`` the index of the file that has it, or -1."""
        if not len(self.hashes):
            return np.full(len(hashes), -1)
        at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.where(self.hashes[at] == hashes, self.owners[at], -1)


class Image(msgspec.Struct, frozen=True):
    """A file that is read as a whole."""

    name: str
    path: Path
    same_as: Identity | None = None
    """The identity when it was chosen; a file that has replaced it is left out."""


def of(images: Sequence[Image], folders: Sequence[Path] = ()) -> Contents:
    """Read images, and all regular files below ``folders``, named by their paths.

    Links below the directories are not followed. Files that cannot be read are left out.

    Raises:
        NotFound: a directory does not exist.
        InvalidInput: it is not a directory.
    """
    below = (image for folder in folders for image in _files(folder))
    return _collect([*images, *below])


def _files(folder: Path) -> Iterator[Image]:
    if not folder.exists():
        raise NotFound(
            f"the directory {folder} does not exist",
            hint="name the directory with the files to compare",
        )
    if not folder.is_dir():
        raise InvalidInput(
            f"{folder} is not a directory", hint="name the directory with the files to compare"
        )
    # No recursion, because file systems allow deeper trees than Python's stack.
    pending = [str(folder)]
    while pending:
        with suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    found = entry.stat(follow_symlinks=False)
                    yield Image(entry.path, Path(entry.path), (found.st_dev, found.st_ino))


def _collect(images: Sequence[Image]) -> Contents:
    # A file system may be a program (FUSE) that never answers.
    found = bounded_wait.each(_try_hash, images, lambda _: None, seconds=_PATIENCE)
    known = [number for number, part in enumerate(found) if part is not None]
    parts = [part for part in found if part is not None]
    every = np.concatenate([np.empty(0, np.uint64), *parts])
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    # np.unique() returns the first of equal hashes, because its sort is stable.
    unique, first = np.unique(every, return_index=True)
    new = unique != ZERO
    return Contents(
        hashes=unique[new],
        owners=owners[first][new],
        names=tuple(images[number].name for number in known),
        sizes=tuple(len(part) * PAGE_SIZE for part in parts),
    )


def _try_hash(image: Image) -> Hashes | None:
    with suppress(OSError, NotFound, NotPermitted, InvalidInput):
        return hash_file(image.path, image.same_as)
    return None


def hash_file(path: Path, same_as: Identity | None = None) -> Hashes:
    """Hash the pages of a file, except for holes.

    Raises:
        OSError: the file cannot be read.
        NotFound: it does not exist or was replaced.
        NotPermitted: this user may not read it.
        InvalidInput: it is not a regular file.
    """
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
