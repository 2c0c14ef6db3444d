"""Where a copy from a guest goes on the host: whole, or not at all.

It is made in a hidden folder beside its place, locked meanwhile, and then renamed. A killed copy
leaves that folder; the next one to the same place removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onecopy.errors import AlreadyExists, InvalidInput, NotEnough, NotFound, NotPermitted
from onecopy.host.lock import is_held
from onecopy.host.removal import remove_tree
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
    """A folder of ours in ``parent``, gone at the end; those of killed processes go first."""
    with _locked(parent):
        for path in parent.glob(f"{_HIDDEN}*"):
            # A copy that ends meanwhile removes its own.
            with suppress(FileNotFoundError):
                if path.stat().st_uid == os.geteuid() and not is_held(path):
                    remove_tree(path)
        work = parent / f"{_HIDDEN}{secrets.token_hex(8)}"
        work.mkdir(0o700)
        held = _locked(work)
        held.__enter__()
    try:
        yield work
    finally:
        remove_tree(work)
        held.__exit__(None, None, None)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def finish(content: Path, final: Path) -> None:
    """Give what is whole its name; raise OSError."""
    mode = content.stat().st_mode & 0o777
    # Who moves a folder must be able to write to it.
    content.chmod(mode | 0o200)
    content.rename(final)
    final.chmod(mode)


@contextmanager
def host_errors(path: StrPath) -> Iterator[None]:
    """Turn an OSError of files at ``path`` into one of ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            available = free_bytes(Path(path).absolute().parent)
            raise NotEnough(
                "disk", needed=available + 1, available=available, hint="nothing was copied"
            ) from error
        kind = _ERRORS.get(error.errno or 0)
        if kind is None:
            raise
        about = error.filename or path
        raise kind(f"{about}: {error.strerror}", hint="nothing was copied") from error
