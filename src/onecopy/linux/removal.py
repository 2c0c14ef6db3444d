"""Remove a directory with untrusted content, of any depth, width and names.

The walk goes down by descriptors, two of which are open at a time, and returns by ".." (openat(2),
unlinkat(2)). So paths have no length limit, no link is followed, and nothing recurses.

Not here: which directories to remove (store/workspace.py, guest/transfer/destination.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

import msgspec

#: The number of subdirectories remembered at each level.
_NAMES = 1024
_OPEN_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: Path) -> str:
    """Remove ``path`` and everything in it, as far as possible.

    A directory with a mount point in it is left alone, because the mounted content is not
    onecopy's.

    Returns:
        The reason reason something is left, else "".
    """
    if _has_mount(path):
        return f"a file system is mounted in {path}"
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
    """A directory on the way down."""

    name: bytes
    inode: int
    directories: list[bytes] = []
    """Subdirectories that are not empty yet."""
    skipped: set[bytes] = set()
    """Entries that cannot be removed."""


class _Removal:
    """One removal; ``_fd`` is the current directory."""

    def __init__(self, parent: int, name: bytes) -> None:
        self._top = _Level(name, os.fstat(parent).st_ino)
        self._fd = os.dup(parent)
        self._levels: list[_Level] = []
        self._device = 0
        self._reason = ""

    def run(self) -> str:
        try:
            if not self._unlink(self._top.name):
                self._device = os.lstat(self._top.name, dir_fd=self._fd).st_dev
                self._descend(self._top.name)
                while self._levels:
                    self._step()
        except OSError as error:
            self._skip(self._top.name, error)
        finally:
            os.close(self._fd)
        return self._reason

    def _step(self) -> None:
        level = self._levels[-1]
        if not level.directories:
            self._clear(level)
        if level.directories:
            self._descend(level.directories.pop())
        else:
            self._ascend()

    def _clear(self, level: _Level) -> None:
        """Remove all entries that are not full directories; collect some subdirectories."""
        # A pass may miss entries that move while the directory shrinks.
        removed_some = True
        while removed_some and not level.directories:
            removed_some = False
            with os.scandir(self._fd) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    if name in level.skipped:
                        continue
                    if self._unlink(name):
                        removed_some = True
                    elif name not in level.skipped:
                        level.directories.append(name)
                        if len(level.directories) == _NAMES:
                            break

    def _unlink(self, name: bytes) -> bool:
        """Remove an entry; return False for a full directory or an entry that cannot be removed."""
        try:
            try:
                os.unlink(name, dir_fd=self._fd)
            except IsADirectoryError:
                os.rmdir(name, dir_fd=self._fd)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                self._skip(name, error)
            return False
        return True

    def _descend(self, name: bytes) -> None:
        try:
            fd = _open_directory(name, self._fd)
        except FileNotFoundError:
            return
        except OSError as error:
            self._skip(name, error)
            return
        status = os.fstat(fd)
        if status.st_dev != self._device:
            os.close(fd)
            self._skip(name, None)
            return
        self._levels.append(_Level(name, status.st_ino))
        os.close(self._fd)
        self._fd = fd

    def _ascend(self) -> None:
        level = self._levels.pop()
        above = self._levels[-1] if self._levels else self._top
        fd = os.open("..", _OPEN_FLAGS, dir_fd=self._fd)
        if os.fstat(fd).st_ino != above.inode:
            os.close(fd)
            self._levels.clear()
            self._skip(level.name, None)
            return
        os.close(self._fd)
        self._fd = fd
        try:
            os.rmdir(level.name, dir_fd=fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._skip(level.name, error)

    def _skip(self, name: bytes, error: OSError | None) -> None:
        """Skip an entry; only the first reason is reported."""
        if self._levels:
            self._levels[-1].skipped.add(name)
        reason = error.strerror if error else "it was moved or is on another file system"
        self._reason = self._reason or f"{os.fsdecode(name)}: {reason}"


def _open_directory(name: bytes, directory: int) -> int:
    """Open a directory to empty it, and give its owner full permissions first.

    Trees of Debian packages contain directories without them, which only root could empty.
    """
    found = os.open(
        name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory
    )
    try:
        status = os.fstat(found)
        if os.geteuid() != 0 and status.st_mode & stat.S_IRWXU != stat.S_IRWXU:
            with contextlib.suppress(OSError):
                Path(f"/proc/self/fd/{found}").chmod(0o700)
        return os.open(".", _OPEN_FLAGS, dir_fd=found)
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
