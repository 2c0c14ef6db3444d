"""The folder of this user's run folders: used only if nobody else can have a hand in it.

``/run/onecopy`` for root; else ``onecopy`` in ``$XDG_RUNTIME_DIR``, or in ``/tmp/onecopy-UID``,
where anybody could have made it first. Not here: what lies in it (guest/run_directory.py,
linux/vmm_registry.py).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from onecopy.errors import NotPermitted

#: What was looked at before: path, user, device, inode and mode. Nobody else can make the same.
_sound: set[tuple[Path, int, int, int, int]] = set()


def run_base() -> Path:
    """Where the run folders of this user lie, whether it is there or not."""
    if os.geteuid() == 0:
        return Path("/run/onecopy")
    return (_runtime() or Path(f"/tmp/onecopy-{os.geteuid()}")) / "onecopy"  # noqa: S108


def _runtime() -> Path | None:
    """``$XDG_RUNTIME_DIR``; a relative one counts as none (XDG base directory specification)."""
    path = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    return path if path.is_absolute() else None


def make_run_base() -> Path:
    """`run_base`, made if missing, 0700; raise NotPermitted if it is not this user's alone."""
    base = run_base()
    if os.geteuid():
        make_own(base.parent)
    return make_own(base)


def make_own(path: Path) -> Path:
    """Make a folder, 0700, or take one that is this user's alone; raise NotPermitted."""
    try:
        path.mkdir(0o700)
    except FileExistsError:
        pass
    except FileNotFoundError as error:
        raise _refused(path, "there is no folder for it to be in") from error
    require_own(path)
    return path


def require_own(path: Path) -> None:
    """Raise NotPermitted unless a folder is this user's, and nobody else can change or replace it.

    A folder of this user's that others may enter is closed to them.
    """
    try:
        found = path.lstat()
    except OSError as error:
        raise _refused(path, str(error.strerror)) from error
    known = (path, os.geteuid(), found.st_dev, found.st_ino, found.st_mode)
    if known in _sound:
        return
    _require_sound_way(path)
    _require_own(path)
    _sound.add((path, os.geteuid(), found.st_dev, found.st_ino, path.lstat().st_mode))


def _require_sound_way(path: Path) -> None:
    for folder in (*reversed(path.parents), *reversed(path.resolve().parents)):
        _require_sound(folder)


def _require_own(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(path, "it is no folder, or a link") from error
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid():
            raise _refused(path, f"it belongs to user {found.st_uid}")
        if found.st_mode & 0o022:
            raise _refused(path, f"others may write to it (mode {found.st_mode & 0o7777:o})")
        if found.st_mode & 0o077 and path.name.startswith("onecopy"):
            os.fchmod(fd, 0o700)
    finally:
        os.close(fd)


def _require_sound(folder: Path) -> None:
    """A folder on the way: root's or this user's, and not open to others, unless it is sticky."""
    try:
        found = folder.lstat()
    except OSError as error:
        raise _refused(folder, str(error.strerror)) from error
    if found.st_uid not in (0, os.geteuid()) and not _is_unmapped_root(found.st_uid):
        raise _refused(folder, f"it belongs to user {found.st_uid}")
    if stat.S_ISDIR(found.st_mode) and found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        raise _refused(folder, f"others may write to it (mode {found.st_mode & 0o7777:o})")


def _is_unmapped_root(uid: int) -> bool:
    """Whether root's files look as this user's in a container without root (user_namespaces(7))."""
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
    return uid == overflow and all(int(inside) > 0 for inside, *_ in ranges)


def _refused(path: Path, why: str) -> NotPermitted:
    if os.geteuid() == 0:
        hint = "make it root's, mode 700; or remove it if no guest runs"
    elif _runtime():
        hint = "set XDG_RUNTIME_DIR to a folder of your own with the mode 700"
    else:
        hint = (
            "set XDG_RUNTIME_DIR to a folder of your own with the mode 700, and tell root of this"
        )
    return NotPermitted(f"{path} cannot be used for run folders: {why}", hint=hint)
