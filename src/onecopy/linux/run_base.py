"""The parent of a user's run directories, used only if no other user can tamper with it.

It is ``/run/onecopy`` for root. For others it is ``onecopy`` in ``$XDG_RUNTIME_DIR``, else in
``/tmp/onecopy-UID``, which any user could have created first.

Not here: its content (guest/run_directory.py, linux/vmm_registry.py).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from onecopy.errors import NotPermitted

#: Directories that passed the checks: path, user, device, inode and mode, which no other user can
#: reproduce.
_checked: set[tuple[Path, int, int, int, int]] = set()


def run_base() -> Path:
    """Return the parent of this user's run directories, whether or not it exists."""
    if os.geteuid() == 0:
        return Path("/run/onecopy")
    return (_xdg_runtime_dir() or Path(f"/tmp/onecopy-{os.geteuid()}")) / "onecopy"  # noqa: S108


def _xdg_runtime_dir() -> Path | None:
    """Return ``$XDG_RUNTIME_DIR`` if it is absolute, as the XDG specification demands."""
    path = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    return path if path.is_absolute() else None


def make_run_base() -> Path:
    """Create `run_base` with mode 0700 if it is missing.

    Raises:
        NotPermitted: other users can access it.
    """
    base = run_base()
    if os.geteuid():
        make_own(base.parent)
    return make_own(base)


def make_own(path: Path) -> Path:
    """Create a directory with mode 0700, or accept one that only this user can access.

    Raises:
        NotPermitted: it cannot be created, or other users can access it.
    """
    try:
        path.mkdir(0o700)
    except FileExistsError:
        pass
    except FileNotFoundError as error:
        raise _refused(path, "its parent directory does not exist") from error
    require_own(path)
    return path


def require_own(path: Path) -> None:
    """Require that a directory is this user's and that no other user can change or replace it.

    If others may enter a directory of this user's, its mode is corrected.

    Raises:
        NotPermitted: the directory or one of its parents is not safe.
    """
    try:
        found = path.lstat()
    except OSError as error:
        raise _refused(path, str(error.strerror)) from error
    known = (path, os.geteuid(), found.st_dev, found.st_ino, found.st_mode)
    if known in _checked:
        return
    _require_safe_parents(path)
    _require_own(path)
    _checked.add((path, os.geteuid(), found.st_dev, found.st_ino, path.lstat().st_mode))


def _require_safe_parents(path: Path) -> None:
    for parent in (*reversed(path.parents), *reversed(path.resolve().parents)):
        _require_safe(parent)


def _require_own(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(path, "it is not a directory or is a symbolic link") from error
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid():
            raise _refused(path, f"it belongs to user {found.st_uid}")
        if found.st_mode & 0o022:
            raise _refused(path, f"other users may write to it (mode {found.st_mode & 0o7777:o})")
        if found.st_mode & 0o077 and path.name.startswith("onecopy"):
            os.fchmod(fd, 0o700)
    finally:
        os.close(fd)


def _require_safe(parent: Path) -> None:
    """Require that a parent is root's or this user's, and that others cannot move entries."""
    try:
        found = parent.lstat()
    except OSError as error:
        raise _refused(parent, str(error.strerror)) from error
    if found.st_uid not in (0, os.geteuid()) and not _is_unmapped_root(found.st_uid):
        raise _refused(parent, f"it belongs to user {found.st_uid}")
    if stat.S_ISDIR(found.st_mode) and found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        raise _refused(parent, f"other users may write to it (mode {found.st_mode & 0o7777:o})")


def _is_unmapped_root(uid: int) -> bool:
    """Whether root owns the file though a rootless container hides that (user_namespaces(7))."""
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
    return uid == overflow and all(int(inside) > 0 for inside, *_ in ranges)


def _refused(path: Path, reason: str) -> NotPermitted:
    if os.geteuid() == 0:
        hint = "make root its owner and set mode 700, or remove it if no guest is running"
    elif _xdg_runtime_dir():
        hint = "set XDG_RUNTIME_DIR to a directory of your own with mode 700"
    else:
        hint = (
            "set XDG_RUNTIME_DIR to a directory of your own with mode 700, and report this to root"
        )
    return NotPermitted(f"{path} cannot hold run directories: {reason}", hint=hint)
