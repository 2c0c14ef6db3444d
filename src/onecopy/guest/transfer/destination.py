"""Places a copy from a guest on the host, complete or not at all.

The copy is made in a locked hidden directory beside its destination, and then renamed. A killed
copy leaves that directory, and the next copy to the same place removes it. Other users may write to
the same place. Their locks and links are ignored.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onecopy.errors import (
    AlreadyExists,
    InsufficientResources,
    InvalidInput,
    NotFound,
    NotPermitted,
)
from onecopy.linux.lock import flock
from onecopy.linux.removal import remove_tree
from onecopy.linux.statfs import is_full
from onecopy.store.disk import free_bytes

StrPath = str | os.PathLike[str]

_HIDDEN = ".onecopy-"
_ERRORS = {
    errno.ENOENT: NotFound,
    errno.EEXIST: AlreadyExists,
    errno.EACCES: NotPermitted,
    errno.EPERM: NotPermitted,
    errno.EROFS: NotPermitted,
    errno.ENOTDIR: InvalidInput,
    errno.EISDIR: InvalidInput,
    errno.EINVAL: InvalidInput,
    errno.ELOOP: InvalidInput,
    errno.ENAMETOOLONG: InvalidInput,
}


def place(target: StrPath, name: str) -> Path:
    """Return the path of a copy of ``name`` to ``target``: inside, if that is a directory.

    Raises:
        InvalidInput: ``target`` cannot be used.
        NotFound: Its parent directory does not exist.
        AlreadyExists: There is a directory at the path.
    """
    final = Path(target)
    if final.is_dir():
        if name in ("", ".", ".."):
            raise InvalidInput(f"{target} already exists", hint="give the copy another name")
        final /= name
    elif os.fspath(target).endswith("/"):
        raise InvalidInput(
            f"{target} is not a directory", hint="make it first, or omit the trailing /"
        )
    if not final.parent.is_dir():
        raise NotFound(f"there is no directory {final.parent}", hint="make it first")
    if final.is_dir():
        raise AlreadyExists(f"the directory {final} already exists", hint="remove it first")
    return final


@contextmanager
def hidden(parent: Path) -> Iterator[Path]:
    """Make a hidden directory in ``parent``, and remove it at the end.

    Hidden directories of killed processes are removed first. The path that this yields goes through
    a descriptor, so other users of ``parent`` cannot replace the directory.

    Raises:
        OSError: The directory cannot be made.
    """
    way = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _sweep(parent, way)
        name, fd = _make(parent, way)
    finally:
        os.close(way)
    work = f"/proc/self/fd/{fd}"
    try:
        yield Path(work)
    except OSError as error:
        if isinstance(error.filename, str):
            error.filename = error.filename.replace(work, str(parent / name))
        raise
    finally:
        _remove(parent / name, fd)
        os.close(fd)


def _sweep(parent: Path, way: int) -> None:
    """Remove this user's hidden directories of killed copies; follow no link."""
    try:
        names = [path.name for path in parent.iterdir() if path.name.startswith(_HIDDEN)]
    except PermissionError:
        return
    for name in names:
        with suppress(OSError):
            fd = _locked(name, way)
            try:
                if os.fstat(fd).st_uid == os.geteuid():
                    _remove(parent / name, fd)
            finally:
                os.close(fd)


def _remove(path: Path, fd: int) -> None:
    """Remove the directory open as ``fd``, if ``path`` still names it."""
    with suppress(FileNotFoundError):
        if os.path.samestat(path.lstat(), os.fstat(fd)):
            remove_tree(path)


def _make(parent: Path, way: int) -> tuple[str, int]:
    """Make a directory in ``parent``, open as ``way``; return its name and locked descriptor."""
    while True:
        name = f"{_HIDDEN}{secrets.token_hex(8)}"
        try:
            os.mkdir(name, 0o700, dir_fd=way)
        except OSError as error:
            error.filename = str(parent / name)
            raise
        # Another process's sweep may have removed it before the lock.
        with suppress(FileNotFoundError, BlockingIOError):
            fd = _locked(name, way)
            if os.fstat(fd).st_nlink:
                return name, fd
            os.close(fd)


def _locked(name: str, way: int) -> int:
    """Open and lock a directory in the directory ``way``; raise OSError if it is locked."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=way)
    try:
        if not flock(fd, wait=False):
            raise BlockingIOError(errno.EWOULDBLOCK, "another process is using it")
    except OSError:
        os.close(fd)
        raise
    return fd


def finish(content: Path, final: Path) -> None:
    """Rename a complete copy to its final path.

    Raises:
        OSError: The path cannot be replaced.
    """
    if not content.is_dir() or content.is_symlink():
        content.rename(final)
        return
    mode = content.stat().st_mode & 0o777
    # Renaming a directory requires write permission to it.
    content.chmod(mode | 0o700)
    fd = os.open(content, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        content.rename(final)
        # By descriptor, because another user may have replaced the name.
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


@contextmanager
def host_errors(path: StrPath) -> Iterator[None]:
    """Turn an OSError of the block into an OnecopyError that names the file or ``path``."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            available = free_bytes(Path(path).absolute().parent)
            raise InsufficientResources(
                "disk",
                needed=available + 1,
                available=available,
                hint="free some space, then copy again: nothing was copied",
            ) from error
        kind = _ERRORS.get(error.errno or 0)
        if kind is None:
            raise
        about = error.filename or path
        raise kind(
            f"cannot use {about}: {error.strerror}", hint="give another path: nothing was copied"
        ) from error
