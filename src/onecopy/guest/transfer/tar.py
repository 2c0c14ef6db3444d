"""Packs a file or directory as a tar stream, and unpacks one, in GNU format as busybox needs.

A guest's stream may be malicious. Therefore `Unpacker` follows the rules of tarfile's filter
"data", which exists only since Python 3.11.4. It makes files, directories and links in directories
that it made itself, and no link leads out. Not here: moving the stream (copy.py).
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import tarfile
from collections.abc import Generator, Iterator
from pathlib import Path

import msgspec

from onecopy.errors import InsufficientResources, TooLarge
from onecopy.model import MIB, format_size

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 18
#: The longest path in bytes (limits.h, PATH_MAX).
_LONGEST = 1 << 12
#: The deepest nesting of directories from a guest.
_DEEPEST = 256
#: Free space to leave on the host's disk: 1/20 of it, at most 1 GiB. It is checked every 16 MiB.
_SHARE, _RESERVE, _LOOK = 20, 1024 * MIB, 16 * MIB


class Limits(msgspec.Struct, frozen=True):
    """Limits of an archive from a guest."""

    size: int = 16384 * MIB
    """Bytes of the archive: all content, and 512 for each file and directory."""
    files: int = 1_000_000
    """Files, directories and links."""


class Unusable(Exception):
    """The stream is not an archive, or has a member that must not be made."""


def pack(path: Path, name: str) -> Iterator[bytes]:
    """Pack a file or a directory tree as ``name``, owned by root.

    Yields:
        Chunks of the archive.

    Raises:
        OSError: A file cannot be read, or is neither a file, a directory nor a link.
    """
    with tarfile.open(fileobj=io.BytesIO(), mode="w") as archive:
        for each, called in _walk(path, name):
            info = archive.gettarinfo(each, called)
            if info is None or not (info.isreg() or info.isdir() or info.islnk() or info.issym()):
                what = "neither a file, a directory nor a link"
                raise OSError(errno.EINVAL, what, os.fspath(each))
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            yield info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
            if info.isreg():
                yield from _content(each, info.size)
    yield bytes(2 * _BLOCK)


def _walk(path: Path, name: str) -> Iterator[tuple[Path, str]]:
    """Yield (path, member name) of a tree, directories before their content, without recursion."""
    waiting = [(path, name)]
    while waiting:
        path, name = waiting.pop()
        yield path, name
        if path.is_dir() and not path.is_symlink():
            inside = sorted(path.iterdir(), reverse=True)
            waiting += [(entry, f"{name}/{entry.name}") for entry in inside]


def _content(path: Path, size: int) -> Iterator[bytes]:
    left = size
    with path.open("rb", buffering=0) as file:
        while left:
            data = file.read(min(left, _CHUNK))
            if not data:
                raise OSError(errno.EIO, "it was truncated while it was read", os.fspath(path))
            left -= len(data)
            yield data
    yield bytes(-size % _BLOCK)


class Unpacker:
    """Unpacks a stream as the file or directory ``target``, which must not exist.

    An archive of a directory has the directory itself as its first member. Modes without set-ID
    bits and times are kept. This user owns all files. After an error the files made so far stay.

    Raises:
        Unusable: The stream is not an archive, or has a forbidden member.
        TooLarge: It exceeds a limit.
        InsufficientResources: The disk is almost full.
        OSError: The disk fails.
    """

    def __init__(self, target: Path, limits: Limits | None = None) -> None:
        self._target = target
        self._limits = limits or Limits()
        self._came = self._looked = self._made = 0
        self._held = memoryview(b"")
        self._folders: dict[Path, tarfile.TarInfo] = {}
        self._files: set[Path] = set()
        self._links: list[Path] = []
        self._whole = False
        self._work = self._members()
        next(self._work)

    def feed(self, data: bytes) -> None:
        """Unpack the next chunk; ignore data after the archive's end."""
        self._count(len(data))
        if not self._whole:
            self._held = memoryview(data)
            try:
                next(self._work)
            except StopIteration:
                self._whole = True

    def _count(self, size: int) -> None:
        self._came += size
        if self._came > self._limits.size:
            raise TooLarge(
                f"it exceeds {format_size(self._limits.size)} (counting 512 bytes for each file)",
                hint="give a larger --max-size, or copy parts of it",
            )
        if self._came >= self._looked:
            self._looked = self._came + _LOOK
            _require_room(self._target.parent)

    def finish(self) -> None:
        """Check that the archive is complete and no link leads out; set modes of directories."""
        if not self._whole or not (self._files or self._folders):
            raise Unusable("the archive ends too early")
        root = Path(os.path.realpath(self._target))
        for link in self._links:
            if not Path(os.path.realpath(link)).is_relative_to(root):
                raise Unusable(f"the link {link.relative_to(self._target)} points outside")
        for folder, info in reversed(self._folders.items()):
            _set(folder, info)

    def _members(self) -> Generator[None, None, None]:
        long = {}
        while True:
            block = yield from self._take(_BLOCK)
            if not any(block):
                return
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.TarError, ValueError) as error:
                raise Unusable(f"the stream is not a tar archive: {error}") from error
            if info.size < 0:
                raise Unusable(f"the stream is not a tar archive: a member has {info.size} bytes")
            if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                long[info.type] = yield from self._long(info.size)
                continue
            info.name = long.pop(tarfile.GNUTYPE_LONGNAME, info.name)
            info.linkname = long.pop(tarfile.GNUTYPE_LONGLINK, info.linkname)
            yield from self._make(info)

    def _make(self, info: tarfile.TarInfo) -> Generator[None, None, None]:
        path = self._path(info.name)
        self._made += 1
        if self._made > self._limits.files:
            raise TooLarge(
                f"it has more than {self._limits.files} files, directories and links",
                hint="give a larger --max-files, or copy parts of it",
            )
        if info.isdir():
            path.mkdir(0o700)
            self._folders[path] = info
        elif info.isreg():
            yield from self._file(path, info)
        elif info.issym():
            path.symlink_to(info.linkname)
            self._links.append(path)
        elif info.islnk():
            known = self._place(info.linkname)
            if known not in self._files:
                raise Unusable(f"{info.name} is a hard link to a file that is not in the archive")
            path.hardlink_to(known)
            self._files.add(path)
        else:
            raise Unusable(f"{info.name} is neither a file, a directory nor a link")

    def _path(self, name: str) -> Path:
        """Return the path of a new member, in a directory that was made before."""
        if not self._files and not self._folders:
            return self._target
        path = self._place(name)
        if path.parent not in self._folders:
            raise Unusable(f"{name!r} comes before its directory")
        return path

    def _place(self, name: str) -> Path:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts:
            raise Unusable(f"{name!r} points outside")
        if len(parts) > _DEEPEST:
            raise Unusable(f"its directories are nested deeper than {_DEEPEST} levels")
        return self._target.joinpath(*parts)

    def _file(self, path: Path, info: tarfile.TarInfo) -> Generator[None, None, None]:
        left = info.size
        with path.open("xb", buffering=0) as file:
            while left:
                data = yield from self._some(left)
                left -= len(data)
                while data:
                    data = data[file.write(data) :]
        self._files.add(path)
        _set(path, info)
        yield from self._take(-info.size % _BLOCK)

    def _long(self, size: int) -> Generator[None, None, str]:
        if size > _LONGEST:
            raise Unusable(f"a name has {size} bytes; the limit is {_LONGEST}")
        data = yield from self._take(size + -size % _BLOCK)
        return data[:size].partition(b"\0")[0].decode("utf-8", "surrogateescape")

    def _take(self, size: int) -> Generator[None, None, bytes]:
        data = b""
        while len(data) < size:
            data += yield from self._some(size - len(data))
        return data

    def _some(self, limit: int) -> Generator[None, None, memoryview]:
        while not self._held:
            yield
        data, self._held = self._held[:limit], self._held[limit:]
        return data


def _require_room(folder: Path) -> None:
    disk = os.statvfs(folder)
    free, reserve = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize // _SHARE
    if free < min(reserve, _RESERVE):
        raise InsufficientResources(
            "disk space beyond the reserve",
            needed=min(reserve, _RESERVE),
            available=free,
            hint="free some space, then copy again: nothing was copied",
        )


def _set(path: Path, info: tarfile.TarInfo) -> None:
    with contextlib.suppress(OverflowError, ValueError):  # an invalid time
        os.utime(path, (info.mtime, info.mtime))
    path.chmod(info.mode & 0o777)
