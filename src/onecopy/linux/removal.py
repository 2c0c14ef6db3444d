"""Removing a folder that others have filled: however deep, wide or odd it is.

It goes down by descriptors, two of which are open at a time, and comes back by ".." (openat(2),
unlinkat(2)): no name is longer than one entry's, no link is followed, and nothing recurses. Not
here: which folders go (store/workspace.py, guest/transfer/destination.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

import msgspec

#: Subfolders whose names are kept at a time, for each level.
_NAMES = 1024
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: Path) -> str:
    """Remove ``path`` and all in it, or as much as can be; return why something stays, else "".

    A folder with something mounted in it is left alone: the mount's content is not ours.
    """
    if _has_mount(path):
        return f"something is mounted in {path}"
    try:
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{path}: {error.strerror}"
    try:
        return _Removal(parent, os.fsencode(path.name)).run()
    finally:
        os.close(parent)


class _Level(msgspec.Struct):
    """A folder on the way down."""

    name: bytes
    inode: int
    folders: list[bytes] = []
    """Subfolders still to be emptied."""
    kept: set[bytes] = set()
    """Entries that cannot be removed."""


class _Removal:
    """One removal; ``_fd`` is the folder in which it is."""

    def __init__(self, parent: int, name: bytes) -> None:
        self._top = _Level(name, os.fstat(parent).st_ino)
        self._fd = os.dup(parent)
        self._levels: list[_Level] = []
        self._device = 0
        self._why = ""

    def run(self) -> str:
        try:
            if not self._unlink(self._top.name):
                self._device = os.lstat(self._top.name, dir_fd=self._fd).st_dev
                self._enter(self._top.name)
                while self._levels:
                    self._step()
        except OSError as error:
            self._keep(self._top.name, error)
        finally:
            os.close(self._fd)
        return self._why

    def _step(self) -> None:
        level = self._levels[-1]
        if not level.folders:
            self._clear(level)
        if level.folders:
            self._enter(level.folders.pop())
        else:
            self._leave()

    def _clear(self, level: _Level) -> None:
        """Remove what can be at once; find some subfolders."""
        # A pass may miss what moves as the folder shrinks.
        again = True
        while again and not level.folders:
            again = False
            with os.scandir(self._fd) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    if name in level.kept:
                        continue
                    if self._unlink(name):
                        again = True
                    elif name not in level.kept:
                        level.folders.append(name)
                        if len(level.folders) == _NAMES:
                            break

    def _unlink(self, name: bytes) -> bool:
        """Whether it is gone now; False for a folder that holds something, and what stays."""
        try:
            try:
                os.unlink(name, dir_fd=self._fd)
            except IsADirectoryError:
                os.rmdir(name, dir_fd=self._fd)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                self._keep(name, error)
            return False
        return True

    def _enter(self, name: bytes) -> None:
        try:
            fd = _open_folder(name, self._fd)
        except FileNotFoundError:
            return
        except OSError as error:
            self._keep(name, error)
            return
        status = os.fstat(fd)
        if status.st_dev != self._device:
            os.close(fd)
            self._keep(name, None)
            return
        self._levels.append(_Level(name, status.st_ino))
        os.close(self._fd)
        self._fd = fd

    def _leave(self) -> None:
        level = self._levels.pop()
        above = self._levels[-1] if self._levels else self._top
        fd = os.open("..", _FOLDER, dir_fd=self._fd)
        if os.fstat(fd).st_ino != above.inode:
            os.close(fd)
            self._levels.clear()
            self._keep(level.name, None)
            return
        os.close(self._fd)
        self._fd = fd
        try:
            os.rmdir(level.name, dir_fd=fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._keep(level.name, error)

    def _keep(self, name: bytes, error: OSError | None) -> None:
        """Go on without it; the first one is told."""
        if self._levels:
            self._levels[-1].kept.add(name)
        why = error.strerror if error else "moved, or on another file system"
        self._why = self._why or f"{os.fsdecode(name)}: {why}"


def _open_folder(name: bytes, folder: int) -> int:
    """A folder to be emptied; one of ours that we may not read or write is made ours first.

    Trees of Debian packages have folders that only root may empty as they are.
    """
    found = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        status = os.fstat(found)
        if os.geteuid() != 0 and status.st_mode & stat.S_IRWXU != stat.S_IRWXU:
            with contextlib.suppress(OSError):
                Path(f"/proc/self/fd/{found}").chmod(0o700)
        return os.open(".", _FOLDER, dir_fd=found)
    finally:
        os.close(found)


def _has_mount(path: Path) -> bool:
    # proc(5): the fifth field is the mount point, with these four characters in octal.
    wanted = str(path.parent.resolve() / path.name)
    for char in "\\ \t\n":
        wanted = wanted.replace(char, f"\\{ord(char):03o}")
    mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    points = (line.split(" ")[4] for line in mounts.splitlines())
    return any(point == wanted or point.startswith(f"{wanted}/") for point in points)
