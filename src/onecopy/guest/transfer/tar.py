"""A file or folder as a stream, and back: tar, in the form that busybox knows too (GNU's).

What comes from a guest may be made to do harm. So `Unpacker` has the rules of tarfile's filter
"data", which Python has from 3.11.4 only: it makes files, folders and links in folders that it has
itself made, and no link leads out of them. Not here: how the stream comes and goes (copy.py).
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
#: Bytes that a path may have (limits.h, PATH_MAX); more in one record is no archive of ours.
_LONGEST = 1 << 12
#: Folders in one another that are made, on the host, of what a guest sends.
_DEEPEST = 256
#: Of a disk this share is left to others, or as many bytes if that is less; it is looked at again
#: after so many bytes.
_SHARE, _RESERVE, _LOOK = 20, 1024 * MIB, 16 * MIB


class Limits(msgspec.Struct, frozen=True):
    """What an archive may come to."""

    size: int = 16384 * MIB
    """Bytes of the archive: what is in it, and 512 for each file and folder."""
    files: int = 1_000_000
    """Files, folders and links."""


class Unusable(Exception):
    """What came is not an archive, or holds what may not be made; says why."""


def pack(path: Path, name: str) -> Iterator[bytes]:
    """The archive of a file, or of a folder and all in it, as ``name``, owned by root.

    Raises OSError with the file's name, also for what is no file, folder or link.
    """
    with tarfile.open(fileobj=io.BytesIO(), mode="w") as archive:
        for each, called in _walk(path, name):
            info = archive.gettarinfo(each, called)
            if info is None or not (info.isreg() or info.isdir() or info.islnk() or info.issym()):
                what = "neither a file, a folder nor a link"
                raise OSError(errno.EINVAL, what, os.fspath(each))
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            yield info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
            if info.isreg():
                yield from _content(each, info.size)
    yield bytes(2 * _BLOCK)


def _walk(path: Path, name: str) -> Iterator[tuple[Path, str]]:
    """All in a folder, each folder before what is in it, however deep that is."""
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
                raise OSError(errno.EIO, "it became shorter while it was read", os.fspath(path))
            left -= len(data)
            yield data
    yield bytes(-size % _BLOCK)


class Unpacker:
    """Makes the file or folder ``target``, which must not exist, of what it is fed.

    An archive of several members is one of a folder, whose first member is the folder itself. Modes
    and times are kept, but for set-id bits; what is made is ours. Raises Unusable, OSError,
    TooLarge beyond ``limits``, and InsufficientResources when the disk is nearly full; what is made
    by then stays.
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
        """Take the next piece; what comes after the archive's end is left alone."""
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
                f"it is larger than {format_size(self._limits.size)}, with 512 bytes for each file",
                hint="give a larger --max-size, or copy parts of it",
            )
        if self._came >= self._looked:
            self._looked = self._came + _LOOK
            _require_room(self._target.parent)

    def finish(self) -> None:
        """All was fed: set what folders get last, and make sure that no link leads out."""
        if not self._whole or not (self._files or self._folders):
            raise Unusable("the archive ends too early")
        root = Path(os.path.realpath(self._target))
        for link in self._links:
            if not Path(os.path.realpath(link)).is_relative_to(root):
                raise Unusable(f"the link {link.relative_to(self._target)} leads out of it")
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
                raise Unusable(f"it is no archive: {error}") from error
            if info.size < 0:
                raise Unusable("it is no archive: a member has less than no size")
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
                f"it has more than {self._limits.files} files, folders and links",
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
                raise Unusable(f"{info.name} is a link to a file that did not come")
            path.hardlink_to(known)
            self._files.add(path)
        else:
            raise Unusable(f"{info.name} is neither a file, a folder nor a link")

    def _path(self, name: str) -> Path:
        """Where a member goes: a new place in a folder of ours."""
        if not self._files and not self._folders:
            return self._target
        path = self._place(name)
        if path.parent not in self._folders:
            raise Unusable(f"{name!r} is in no folder that came before it")
        return path

    def _place(self, name: str) -> Path:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts:
            raise Unusable(f"{name!r} leads out of it")
        if len(parts) > _DEEPEST:
            raise Unusable(f"folders in it lie in one another, more than {_DEEPEST} deep")
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
            raise Unusable("it is no archive: a name is too long")
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
            "disk to leave some to others",
            needed=min(reserve, _RESERVE),
            available=free,
            hint="nothing was copied",
        )


def _set(path: Path, info: tarfile.TarInfo) -> None:
    with contextlib.suppress(OverflowError, ValueError):  # a time that is none
        os.utime(path, (info.mtime, info.mtime))
    path.chmod(info.mode & 0o777)
