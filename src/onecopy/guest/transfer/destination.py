"""Where a copy from a guest goes on the host: whole, or not at all.

It is made in a hidden folder beside its place, locked meanwhile, and then renamed. A killed copy
leaves that folder; the next one to the same place removes it. Others may write to that place, too:
what they lock or link there is not looked at.
"""

from __future__ import annotations

import errno
import fcntl
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
from onecopy.linux.removal import remove_tree
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
    """The name that ``name`` gets when it is copied to ``target``: in it, if that is a folder.

    Raises InvalidInput, NotFound, AlreadyExists (a folder is there).
    """
    final = Path(target)
    if final.is_dir():
        if name in ("", ".", ".."):
            raise InvalidInput(f"{target} is there already", hint="give the copy a name of its own")
        final /= name
    elif os.fspath(target).endswith("/"):
        raise InvalidInput(f"{target} is no folder", hint="make it first, or leave the last / out")
    if not final.parent.is_dir():
        raise NotFound(f"there is no folder {final.parent}", hint="make it first")
    if final.is_dir():
        raise AlreadyExists(f"the folder {final} is there already", hint="remove it first")
    return final


@contextmanager
def hidden(parent: Path) -> Iterator[Path]:
    """A folder of ours in ``parent``, gone at the end; those of killed processes go first.


    It is named by its descriptor: whatever others do in ``parent``, it is this folder. Raises
    OSError.
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
    """Remove what killed copies of ours have left; nobody else's, and through no link."""
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
    """Remove the folder ``fd``, if that is what has the name."""
    with suppress(FileNotFoundError):
        if os.path.samestat(path.lstat(), os.fstat(fd)):
            remove_tree(path)


def _make(parent: Path, way: int) -> tuple[str, int]:
    """A new folder in ``parent``, open as ``way``, and the descriptor that locks it."""
    while True:
        name = f"{_HIDDEN}{secrets.token_hex(8)}"
        try:
            os.mkdir(name, 0o700, dir_fd=way)
        except OSError as error:
            error.filename = str(parent / name)
            raise
        # Somebody who sweeps may have been faster.
        with suppress(FileNotFoundError, BlockingIOError):
            fd = _locked(name, way)
            if os.fstat(fd).st_nlink:
                return name, fd
            os.close(fd)


def _locked(name: str, way: int) -> int:
    """Open a folder in the folder ``way``, and lock it, if nobody else has."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=way)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def finish(content: Path, final: Path) -> None:
    """Give what is whole its name; raise OSError."""
    if not content.is_dir() or content.is_symlink():
        content.rename(final)
        return
    mode = content.stat().st_mode & 0o777
    # Who moves a folder must be able to write to it.
    content.chmod(mode | 0o700)
    fd = os.open(content, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        content.rename(final)
        # Not by its name, which others may have given to something else.
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


@contextmanager
def host_errors(path: StrPath) -> Iterator[None]:
    """Turn an OSError of files at ``path`` into one of ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            available = free_bytes(Path(path).absolute().parent)
            raise InsufficientResources(
                "disk", needed=available + 1, available=available, hint="nothing was copied"
            ) from error
        kind = _ERRORS.get(error.errno or 0)
        if kind is None:
            raise
        about = error.filename or path
        raise kind(f"{about}: {error.strerror}", hint="nothing was copied") from error
