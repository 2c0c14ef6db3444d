"""Copies a tree in order of names, as the members of an archive that never exists as a file.

Not here: writing the members (unpack.py), checking a tree (tree.py).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onecopy.images.pax_header import BadMember
from onecopy.images.tar_format import Member
from onecopy.images.unpack import Unpacker
from onecopy.linux.sparse import data_ranges

_KINDS = {
    stat.S_IFREG: "-",
    stat.S_IFDIR: "d",
    stat.S_IFLNK: "l",
    stat.S_IFCHR: "c",
    stat.S_IFBLK: "b",
    stat.S_IFIFO: "p",
}
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def copy_tree(tree: Path, unpacker: Unpacker) -> None:
    """Copy ``tree`` except sockets; the entries of each directory in order of their names.

    Raises:
        BadMember: A file cannot be stored, or changed while it was read.
        InsufficientResources, OSError: The disk is full or fails.
    """
    linked: dict[int, bytes] = {}
    for path, status in _walk(tree):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode))
        if not kind:
            continue
        name = os.fsencode(os.path.relpath(path, tree))
        first = linked.setdefault(status.st_ino, name) if _has_links(status) else name
        with _content(path, kind if first == name else "h") as content:
            unpacker.add(_member(name, first, kind, path, status, content.pieces), content)
    unpacker.finish()


def _walk(tree: Path) -> Iterator[tuple[str, os.stat_result]]:
    root = os.fspath(tree)
    yield root, os.lstat(root)
    pending = [root]
    while pending:
        folder = pending.pop()
        with os.scandir(folder) as entries:
            names = sorted((entry.name for entry in entries), key=os.fsencode)
        for name in names:
            path = f"{folder}/{name}"
            status = os.lstat(path)
            yield path, status
            if stat.S_ISDIR(status.st_mode):
                pending.append(path)


def _has_links(status: os.stat_result) -> bool:
    return status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode)


def _member(
    name: bytes,
    first: bytes,
    kind: str,
    path: str,
    status: os.stat_result,
    pieces: list[tuple[int, int]],
) -> Member:
    if first != name:
        kind, target = "h", first
    else:
        # Path.readlink() would remove a trailing slash.
        target = os.readlink(os.fsencode(path)) if kind == "l" else b""  # noqa: PTH115
    return Member(
        name=name,
        kind=kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        size=status.st_size if kind == "-" else 0,
        stored=sum(size for _, size in pieces),
        mtime=status.st_mtime_ns,
        target=target,
        device=status.st_rdev,
        attributes=_attributes(path) if kind != "h" else {},
        pieces=pieces if kind == "-" else None,
    )


def _attributes(path: str) -> dict[str, bytes]:
    names = os.listxattr(path, follow_symlinks=False)
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in names}


class _Content:
    """The data of a file, without its holes."""

    def __init__(self, fd: int, pieces: list[tuple[int, int]]) -> None:
        self._fd, self.pieces = fd, pieces
        self._todo = list(reversed(pieces))

    def read(self, size: int) -> bytes:
        offset, left = self._todo.pop()
        data = os.pread(self._fd, min(size, left), offset)
        if not data:
            raise BadMember(b"", "it was truncated while it was read")
        if len(data) < left:
            self._todo.append((offset + len(data), left - len(data)))
        return data


@contextmanager
def _content(path: str, kind: str) -> Iterator[_Content]:
    if kind != "-":
        yield _Content(-1, [])
        return
    fd = os.open(path, _READ)
    try:
        yield _Content(fd, list(_pieces(fd)))
    finally:
        os.close(fd)


def _pieces(fd: int) -> Iterator[tuple[int, int]]:
    """Yield offset and size of each range of a file that holds data."""
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        for start, end in data_ranges(fd, status.st_size):
            yield start, end - start
