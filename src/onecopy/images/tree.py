"""Scans a directory tree's metadata, resolves paths inside a tree, and sets its times.

No function recurses or keeps more of a tree than the names of its directories. Not here: writing a
tree as an image (fs_image.py).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from onecopy.errors import BadSource
from onecopy.model import PAGE_SIZE

#: Limits of the programs that make images: entries, nested directories, bytes of a path below the
#: root.
MAX_ENTRIES, MAX_LEVELS, MAX_PATH = 4_000_000, 500, 3500
#: The latest time (seconds since 1970) that ext4 can store; most stores are on ext4.
MAX_TIME = 0x3_7FFF_FFFF
# path_resolution(7): the kernel follows at most 40 symbolic links.
_MAX_LINKS = 40
_OVERLAY = "trusted.overlay."
_LAYER_HINT = "this is a layer of an overlay: mount the overlay, and build from dir:MOUNTPOINT"


class Facts(msgspec.Struct, frozen=True):
    """The result of `scan`."""

    newest: int
    """The newest modification time, in whole seconds since 1970."""
    newest_path: str
    """The path with that time."""
    inodes: int
    """Number of inodes."""
    blocks: int
    """An upper bound of the blocks (of `PAGE_SIZE`) in an image; holes count as data."""
    longest_name: int
    """Length of the longest file name in bytes."""
    sockets: int
    """Number of sockets."""
    trusted: bool
    """Whether an attribute is named trusted.*, which only an administrator can read."""
    devices: bool
    """Whether the tree has device nodes."""
    fingerprint: str
    """A digest that changes with any change of the tree."""


def walk(tree: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the path and lstat(2) of ``tree`` and all entries below, directories before content.

    Raises:
        OSError: A directory cannot be read.
    """
    return ((Path(path), status) for path, status in _walk(tree))


def _walk(tree: Path) -> Iterator[tuple[str, os.stat_result]]:
    root = os.fspath(tree)
    yield root, os.lstat(root)
    pending = [root] if tree.is_dir() and not tree.is_symlink() else []
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                yield entry.path, status
                if stat.S_ISDIR(status.st_mode):
                    pending.append(entry.path)


def scan(tree: Path) -> Facts:
    """Read the metadata of ``tree``.

    Raises:
        BadSource: An entry cannot be read, vanishes, exceeds a limit of images, or is on another
            file system, such as a mounted /proc.
    """
    try:
        return _Scan(tree).facts()
    except OSError as error:
        where = os.fsdecode(error.filename or "")
        where = where if len(where) <= 255 else f"{where[:64]}[...]"
        raise BadSource(
            f"cannot read {where!r}: {error.strerror}",
            hint="stop what changes the tree; run as root if others own its files",
        ) from error


class _Scan:
    """A scan of a tree."""

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self._above = len(os.fsencode(tree)) + 1
        self._device = os.lstat(tree).st_dev
        self._linked: set[int] = set()
        self._newest, self._newest_path = 0, ""
        self._trusted = self._devices = False
        self._inodes = self._blocks = self._longest = self._names = self._sockets = 0

    def facts(self) -> Facts:
        # A sum of the entries' digests does not depend on their order.
        digest = 0
        for count, (path, status) in enumerate(_walk(self._tree), start=1):
            raw = os.fsencode(path)
            record = repr((raw, *_identity(status))).encode()
            digest += int.from_bytes(hashlib.blake2b(record, digest_size=32).digest(), "big")
            if count > MAX_ENTRIES:
                raise _bad(
                    path,
                    f"exceeds the limit of {MAX_ENTRIES:,} files in a tree",
                    "build from fewer files",
                )
            self._add(path, raw, status)
        # A directory entry does not cross blocks, so each block can lose the longest entry.
        return Facts(
            newest=self._newest,
            newest_path=self._newest_path,
            inodes=self._inodes,
            blocks=self._blocks + self._names // (PAGE_SIZE - 264),
            longest_name=self._longest,
            sockets=self._sockets,
            trusted=self._trusted,
            devices=self._devices,
            fingerprint=f"{digest % (1 << 256):x}",
        )

    def _add(self, path: str, raw: bytes, status: os.stat_result) -> None:
        seconds = status.st_mtime_ns // 10**9
        self._check_limits(path, raw, status, seconds)
        if seconds > self._newest or not self._newest_path:
            self._newest, self._newest_path = max(0, seconds), path
        # The name of the root itself does not count.
        name = len(raw) - raw.rfind(b"/") - 1 if len(raw) > self._above else 0
        self._longest = max(self._longest, name)
        # A directory entry has 8 bytes and the name, rounded up to 4.
        self._names += name + 11
        if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
            if status.st_ino in self._linked:
                return
            self._linked.add(status.st_ino)
        self._devices |= stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)
        self._sockets += stat.S_ISSOCK(status.st_mode)
        self._inodes += 1
        attributes = os.listxattr(path, follow_symlinks=False)
        _refuse_overlay_layer(path, status, attributes)
        self._trusted |= any(name.startswith("trusted.") for name in attributes)
        self._blocks += _blocks(status) + bool(attributes)

    def _check_limits(self, path: str, raw: bytes, status: os.stat_result, seconds: int) -> None:
        if stat.S_ISDIR(status.st_mode) and status.st_dev != self._device:
            raise _bad(path, "is on another file system", "unmount it, or copy the directory first")
        inside = raw[self._above :]
        levels = inside.count(b"/")
        if levels >= MAX_LEVELS or len(inside) > MAX_PATH:
            found = f"{levels} levels and {len(inside)} bytes"
            limit = f"the limits are {MAX_LEVELS} and {MAX_PATH}"
            raise _bad(path, f"has a path of {found}; {limit}", "move it up, or remove it")
        if not 0 <= seconds <= MAX_TIME:
            what = f"has a time of {seconds} s since 1970; the range is 0 to {MAX_TIME}"
            raise _bad(path, what, "set another time with touch(1)")


def _refuse_overlay_layer(path: str, status: os.stat_result, attributes: Iterable[str]) -> None:
    """Raise BadSource for an overlay's marks: a guest's root is a layer, and would obey them."""
    if stat.S_ISCHR(status.st_mode) and not status.st_rdev:
        raise _bad(path, "is an overlay's whiteout (device 0, 0)", _LAYER_HINT)
    for name in attributes:
        if name.startswith(_OVERLAY):
            raise _bad(path, f"has the overlay attribute {name!a}", _LAYER_HINT)


def _bad(path: str, what: str, hint: str) -> BadSource:
    shown = path if len(path) <= 255 else f"{path[:64]}[...]"
    return BadSource(f"{shown!r} {what}", hint=hint)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (
        status.st_ino,
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_rdev,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _blocks(status: os.stat_result) -> int:
    """Return an upper bound of an inode's blocks: its content and ext2's indirect blocks."""
    if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
        data = -(-status.st_size // PAGE_SIZE)
        return data + (data // 1000 + 3 if data > 12 else 0)
    return 1


def resolve_inside(tree: Path, path: str) -> Path | None:
    """Resolve ``path`` with ``tree`` as the root; return None for a loop of symbolic links.

    Links cannot lead out of ``tree``.
    """
    todo = path.split("/")[::-1]
    here: list[str] = []
    links = 0
    while todo:
        part = todo.pop()
        if part == "..":
            here = here[:-1]
        elif part not in ("", "."):
            candidate = tree.joinpath(*here, part)
            if candidate.is_symlink():
                links += 1
                if links > _MAX_LINKS:
                    return None
                target = str(candidate.readlink())
                here = [] if target.startswith("/") else here
                todo += target.split("/")[::-1]
            else:
                here.append(part)
    return tree.joinpath(*here)


def find_init(tree: Path) -> str | None:
    """Return the path of the init program in ``tree``, as guests see it; None without one."""
    for path in ("/sbin/init", "/usr/lib/systemd/systemd"):
        found = resolve_inside(tree, path)
        if found and found.is_file() and found.stat().st_mode & 0o111:
            return path
    return None


def clock(folder: Path) -> float:
    """Return the time (seconds since 1970) of the clock that stamps files.

    That clock is up to a tick behind `time.time`. The call sets the times of ``folder``.

    Raises:
        OSError: The times cannot be set.
    """
    os.utime(folder)
    return folder.stat().st_mtime


def clamp_times(tree: Path, start: float) -> int:
    """Set the times of all files modified since ``start`` to the newest earlier time in the tree.

    Files that a build wrote itself then have a time that depends on its input only.

    Args:
        tree: The directory to change.
        start: The start of the build, in seconds since 1970.

    Returns:
        The time set, in whole seconds since 1970.

    Raises:
        OSError: A file cannot be read or changed.
    """
    # The clock may have been set back since. Only the clock sets a file's change time.
    start = min(start, *(s.st_ctime for _, s in walk(tree)))
    limit = max((int(s.st_mtime) for _, s in walk(tree) if s.st_mtime < start), default=0)
    for path, status in walk(tree):
        if status.st_mtime >= start:
            os.utime(path, (limit, limit), follow_symlinks=False)
    return limit
