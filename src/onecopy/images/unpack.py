"""Writes the members of an archive below a directory, with owners, modes, times and attributes.

All paths are opened relative to that directory's descriptor, and no symbolic link leads out of it.
Directories get their times last, because files created in them change those. Not here: reading the
archive (tar_format.py).
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from onecopy.images.free_space import not_enough
from onecopy.images.pax_header import BadMember
from onecopy.images.tar_format import Member, TarReader
from onecopy.images.tree import MAX_ENTRIES, MAX_LEVELS, MAX_PATH, MAX_TIME
from onecopy.linux.open_beneath import open_beneath
from onecopy.model import PAGE_SIZE, align_up

_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DEVICES = {"c": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}
_PIECE = 1 << 20
_LENGTH = struct.Struct("I")
#: Errors of the disk. All others are the member's.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}


class _Folder(msgspec.Struct, frozen=True):
    """A directory to finish; ``member`` is None for one without a member in the archive."""

    path: bytes
    member: Member | None


class Content(Protocol):
    """The content of the current member."""

    def read(self, size: int, /) -> bytes:
        """Read up to ``size`` bytes; raise BadMember at the end."""
        ...


class Unpacker:
    """A writer of members below a directory; a context manager."""

    def __init__(self, into: Path, scratch: Path | None = None) -> None:
        """Prepare to write below ``into``.

        Args:
            into: An empty directory.
            scratch: A directory for a temporary file; default: the parent of ``into``.

        Raises:
            OSError: The disk of ``into`` cannot be examined.
        """
        self._into, self._scratch = into, scratch or into.parent
        self._ends = ExitStack()
        self._room = shutil.disk_usage(into).free
        self._taken = self._count = self._newest = 0
        self._present: tuple[bytes, int] | None = None
        """Path and descriptor of the last member's directory."""

    def __enter__(self) -> Unpacker:
        self._root = os.open(self._into, _FOLDER | os.O_CLOEXEC)
        self._ends.callback(os.close, self._root)
        # On disk, because an archive may have millions of directories.
        self._folders = self._ends.enter_context(tempfile.TemporaryFile(dir=self._scratch))
        self._remember(_Folder(b"", None))
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()
        self._ends.close()

    def add(self, member: Member, archive: Content) -> None:
        """Write a member.

        Args:
            member: Its header.
            archive: A stream at the member's content.

        Raises:
            BadMember: The member points outside, cannot be stored, or exceeds a limit.
            InsufficientResources: The disk is too small.
            OSError: The disk fails.
        """
        with _name_member(member.name):
            path = self._path(member)
            self._account(member)
            if member.kind == "d":
                self._make_directory(path, member)
            elif not path:
                raise BadMember(member.name, "the root must be a directory")
            else:
                self._make(path, member, archive)
        self._newest = max(self._newest, member.mtime // 10**9)

    def finish(self) -> None:
        """Set the owners, modes, attributes and times of all directories.

        Raises:
            BadMember: An attribute or time cannot be stored.
            OSError: The disk fails.
        """
        self._leave()
        self._folders.seek(0)
        while head := self._folders.read(_LENGTH.size):
            data = self._folders.read(_LENGTH.unpack(head)[0])
            folder = msgspec.msgpack.decode(data, type=_Folder)
            try:
                fd = open_beneath(self._root, folder.path, _FOLDER | os.O_NOFOLLOW)
            except (FileNotFoundError, NotADirectoryError):
                # A later member replaced the directory.
                continue
            except OSError as error:
                if error.errno == errno.ELOOP:
                    continue
                raise
            try:
                with _name_member(folder.path):
                    self._set_directory(fd, folder)
            finally:
                os.close(fd)

    def _set_directory(self, fd: int, folder: _Folder) -> None:
        if folder.member:
            self._set(fd, f"/proc/self/fd/{fd}", folder.member)
            return
        os.fchown(fd, 0, 0)
        os.fchmod(fd, 0o755)
        os.utime(fd, (self._newest, self._newest))

    def _path(self, member: Member) -> bytes:
        """Return the member's relative path; raise BadMember for one that leads outside."""
        for name in (member.name, member.target if member.kind == "h" else b""):
            if name.startswith(b"/") or b".." in name.split(b"/"):
                raise BadMember(member.name, "it points outside the archive")
        return _normalise(member.name)

    def _account(self, member: Member) -> None:
        """Count the member and its space; raise BadMember, InsufficientResources."""
        self._count += 1
        if self._count > MAX_ENTRIES:
            raise BadMember(member.name, f"the archive has more than {MAX_ENTRIES:,} members")
        if not 0 <= member.mtime // 10**9 <= MAX_TIME:
            raise BadMember(
                member.name,
                f"its time is {member.mtime // 10**9} s since 1970; the range is 0 to {MAX_TIME}",
            )
        self._taken += align_up(member.size, PAGE_SIZE) if member.kind == "-" else PAGE_SIZE
        if self._taken > self._room:
            raise not_enough(self._into, self._taken)

    def _make_directory(self, path: bytes, member: Member) -> None:
        if path:
            parent, name = self._enter(path)
            try:
                os.mkdir(name, 0o700, dir_fd=parent)
            except FileExistsError:
                if not stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
                    self._remove(name, parent)
                    os.mkdir(name, 0o700, dir_fd=parent)
        self._remember(_Folder(path, member))

    def _make(self, path: bytes, member: Member, archive: Content) -> None:
        parent, name = self._enter(path)
        make = self._make_file if member.kind == "-" else self._make_other
        try:
            make(name, parent, member, archive)
        except FileExistsError:
            if member.kind == "h" and self._is_same(name, parent, member):
                return
            # As in every tar program, a later member replaces an earlier one.
            self._remove(name, parent)
            make(name, parent, member, archive)

    def _make_file(self, name: bytes, parent: int, member: Member, archive: Content) -> None:
        fd = os.open(name, _NEW, 0o600, dir_fd=parent)
        try:
            whole = [(0, member.size)] if member.pieces is None else member.pieces
            for offset, size in whole:
                _copy(archive, fd, offset, size)
            if member.pieces is not None:
                os.ftruncate(fd, member.size)
            self._set(fd, f"/proc/self/fd/{fd}", member)
        finally:
            os.close(fd)

    def _make_other(self, name: bytes, parent: int, member: Member, _: Content) -> None:
        """Make a symbolic or hard link, a device node or a FIFO."""
        if member.kind == "h":
            self._link(name, parent, member)
            return
        if member.kind == "l":
            os.symlink(member.target, name, dir_fd=parent)
        else:
            os.mknod(name, 0o600 | _DEVICES[member.kind], member.device, dir_fd=parent)
        os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
        where = f"/proc/self/fd/{parent}/{os.fsdecode(name)}"
        if member.kind != "l":
            os.chmod(name, member.mode, dir_fd=parent)
        _set_attributes(where, member, follow=False)
        times = (member.mtime, member.mtime)
        os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)

    def _link(self, name: bytes, parent: int, member: Member) -> None:
        folder, _, target = _normalise(member.target).rpartition(b"/")
        fd = open_beneath(self._root, folder, os.O_PATH | os.O_DIRECTORY)
        try:
            os.link(target, name, src_dir_fd=fd, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(fd)

    def _is_same(self, name: bytes, parent: int, member: Member) -> bool:
        """Return whether the existing file is the hard link's target already."""
        folder, _, target = _normalise(member.target).rpartition(b"/")
        fd = open_beneath(self._root, folder, os.O_PATH | os.O_DIRECTORY)
        try:
            one, other = os.lstat(target, dir_fd=fd), os.lstat(name, dir_fd=parent)
        finally:
            os.close(fd)
        return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)

    def _set(self, fd: int, where: str, member: Member) -> None:
        """Set owner, mode, attributes and times of a file or directory."""
        os.fchown(fd, member.uid, member.gid)
        os.fchmod(fd, member.mode)
        _set_attributes(where, member, follow=True)
        os.utime(fd, ns=(member.mtime, member.mtime))
        if member.mtime >> 31 >= 10**9 and os.fstat(fd).st_mtime_ns < member.mtime - 10**9:
            raise BadMember(member.name, "its time is later than this disk's file system can store")

    def _enter(self, path: bytes) -> tuple[int, bytes]:
        """Return the descriptor of the path's directory, open until the next call, and the name."""
        folder, _, name = path.rpartition(b"/")
        if self._present is None or self._present[0] != folder:
            self._leave()
            try:
                fd = open_beneath(self._root, folder, _FOLDER)
            except FileNotFoundError:
                fd = self._make_parents(folder)
            self._present = (folder, fd)
        return self._present[1], name

    def _leave(self) -> None:
        if self._present:
            os.close(self._present[1])
            self._present = None

    def _make_parents(self, folder: bytes) -> int:
        """Make a directory and its parents, for which the archive has no member so far."""
        fd = os.dup(self._root)
        parts = folder.split(b"/")
        for count, name in enumerate(parts, start=1):
            path = b"/".join(parts[:count])
            try:
                os.mkdir(name, 0o700, dir_fd=fd)
                self._remember(_Folder(path, None))
            except FileExistsError:
                pass
            finally:
                os.close(fd)
            fd = open_beneath(self._root, path, _FOLDER)
        return fd

    def _remove(self, name: bytes, parent: int) -> None:
        try:
            os.unlink(name, dir_fd=parent)
        except IsADirectoryError:
            os.rmdir(name, dir_fd=parent)

    def _remember(self, folder: _Folder) -> None:
        data = msgspec.msgpack.encode(folder)
        self._folders.write(_LENGTH.pack(len(data)) + data)


def _normalise(name: bytes) -> bytes:
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if len(parts) > MAX_LEVELS:
        raise BadMember(name, f"its path has {len(parts)} levels; the limit is {MAX_LEVELS}")
    path = b"/".join(parts)
    if len(path) > MAX_PATH:
        raise BadMember(name, f"its path has {len(path)} bytes; the limit is {MAX_PATH}")
    return path


def _copy(archive: Content, fd: int, offset: int, size: int) -> None:
    os.lseek(fd, offset, os.SEEK_SET)
    while size:
        data = archive.read(min(size, _PIECE))
        size -= len(data)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]


def _set_attributes(where: str, member: Member, *, follow: bool) -> None:
    for name, value in member.attributes.items():
        try:
            os.setxattr(where, name, value, follow_symlinks=follow)
        except OSError as error:
            if error.errno in (errno.EDQUOT, errno.EIO):
                raise
            raise BadMember(
                member.name, f"its attribute {name!a} cannot be stored: {error.strerror}"
            ) from error


@contextmanager
def _name_member(name: bytes) -> Iterator[None]:
    """Turn an OSError of the block into a BadMember, unless the disk is at fault."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise
        why = error.strerror or str(error)
        if error.errno == errno.EXDEV:
            why = "a symbolic link in its path points outside the archive"
        raise BadMember(name, why) from error
    except BadMember as error:
        raise BadMember(error.name or name, error.what) from error


def unpack(archive: TarReader, into: Path) -> int:
    """Unpack all members below the empty directory ``into``.

    Returns:
        The number of members.

    Raises:
        BadMember: A member cannot be read or stored.
        InsufficientResources, OSError: The disk is too small or fails.
    """
    count = 0
    with Unpacker(into) as unpacker:
        while member := archive.next():
            unpacker.add(member, archive)
            count += 1
        unpacker.finish()
    return count
