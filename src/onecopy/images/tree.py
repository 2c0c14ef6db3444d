"""What a folder tree holds, found by reading its metadata; and times put right in one.

Nothing here recurses, or keeps more of a tree than its folders' names. Not here: turning a tree
into an image (fs_image.py).
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

#: What is too much for the programs that make images: entries, folders in one another, bytes of a
#: path below the root.
MOST_ENTRIES, MOST_LEVELS, MOST_PATH = 4_000_000, 500, 3500
#: The latest time (seconds since 1970) that ext4 can hold, on which stores mostly are.
NEWEST = 0x3_7FFF_FFFF
# path_resolution(7) gives up after as many links.
_MAX_LINKS = 40
_OVERLAY = "trusted.overlay."
_LAYER_HINT = "that is part of an overlay, not a root: mount the overlay, and build from dir:MOUNT"


class Facts(msgspec.Struct, frozen=True):
    """What `scan` found.

    ``newest`` is the newest modification time in whole seconds since 1970, and ``newest_path`` of
    what; ``inodes`` and ``blocks`` (of `PAGE_SIZE`, holes counted as data) bound what an image of
    it takes; ``longest_name`` is in bytes; ``sockets`` are how many there are; ``trusted`` says
    whether there are attributes that only an administrator sees; ``devices`` whether there
    are devices; ``fingerprint`` changes when anything in the tree does.
    """

    newest: int
    newest_path: str
    inodes: int
    blocks: int
    longest_name: int
    sockets: int
    trusted: bool
    devices: bool
    fingerprint: str


def walk(tree: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Path and lstat(2) of ``tree`` and all below it, folders before what is in them.

    Raises OSError.
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

    Raises BadSource if something cannot be read, vanishes, cannot be kept in an image, or is a
    folder of another file system (a mounted /proc has no business in an image).
    """
    try:
        return _Scan(tree).facts()
    except OSError as error:
        where = os.fsdecode(error.filename or "")
        where = where if len(where) <= 255 else f"{where[:64]}[...]"
        raise BadSource(
            f"cannot read {where!r}: {error.strerror}",
            hint="nothing may change in it meanwhile; run as root if it belongs to others",
        ) from error


class _Scan:
    """One reading of a tree."""

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self._above = len(os.fsencode(tree)) + 1
        self._device = os.lstat(tree).st_dev
        self._linked: set[int] = set()
        self._newest, self._newest_path = 0, ""
        self._trusted = self._devices = False
        self._inodes = self._blocks = self._longest = self._names = self._sockets = 0

    def facts(self) -> Facts:
        # Of all entries, in whatever order they come.
        digest = 0
        for count, (path, status) in enumerate(_walk(self._tree), start=1):
            raw = os.fsencode(path)
            record = repr((raw, *_identity(status))).encode()
            digest += int.from_bytes(hashlib.blake2b(record, digest_size=32).digest(), "big")
            if count > MOST_ENTRIES:
                raise _bad(path, f"is one of more than {MOST_ENTRIES:,} files", "leave some out")
            self._add(path, raw, status)
        # Entries do not cross blocks, so each block may lose up to the longest entry.
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
        self._require_fit(path, raw, status, seconds)
        if seconds > self._newest or not self._newest_path:
            self._newest, self._newest_path = max(0, seconds), path
        # The root's own name is no part of the tree.
        name = len(raw) - raw.rfind(b"/") - 1 if len(raw) > self._above else 0
        self._longest = max(self._longest, name)
        # A folder's entry is 8 bytes and the name, rounded up to 4.
        self._names += name + 11
        if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
            if status.st_ino in self._linked:
                return
            self._linked.add(status.st_ino)
        self._devices |= stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)
        self._sockets += stat.S_ISSOCK(status.st_mode)
        self._inodes += 1
        attributes = os.listxattr(path, follow_symlinks=False)
        _require_no_layer(path, status, attributes)
        self._trusted |= any(name.startswith("trusted.") for name in attributes)
        self._blocks += _blocks(status) + bool(attributes)

    def _require_fit(self, path: str, raw: bytes, status: os.stat_result, seconds: int) -> None:
        if stat.S_ISDIR(status.st_mode) and status.st_dev != self._device:
            raise _bad(path, "is on another file system", "unmount it, or copy the folder first")
        inside = raw[self._above :]
        if inside.count(b"/") >= MOST_LEVELS or len(inside) > MOST_PATH:
            limit = f"may be {MOST_LEVELS} folders deep and have {MOST_PATH} bytes"
            raise _bad(path, f"lies too deep: a path {limit}", "move it up, or leave it out")
        if not 0 <= seconds <= NEWEST:
            what = f"has a time that cannot be kept: {seconds} s from 1970, of 0 to {NEWEST}"
            raise _bad(path, what, "give it another time with touch(1)")


def _require_no_layer(path: str, status: os.stat_result, attributes: Iterable[str]) -> None:
    """A guest's root is a layer of an overlay: there these would hide files, or spoil them."""
    if stat.S_ISCHR(status.st_mode) and not status.st_rdev:
        raise _bad(path, "is an overlay's mark of a removed file (device 0, 0)", _LAYER_HINT)
    for name in attributes:
        if name.startswith(_OVERLAY):
            raise _bad(path, f"has an overlay's attribute {name!a}", _LAYER_HINT)


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
    """Blocks that the inode takes at most: content, and ext2's indirect blocks."""
    if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
        data = -(-status.st_size // PAGE_SIZE)
        return data + (data // 1000 + 3 if data > 12 else 0)
    return 1


def resolve_inside(tree: Path, path: str) -> Path | None:
    """Where ``path`` leads if ``tree`` is the root: links cannot lead out. None if in a circle."""
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
    """The path, as the guest will see it, of the init that ``tree`` holds; None if it has none."""
    for path in ("/sbin/init", "/usr/lib/systemd/systemd"):
        found = resolve_inside(tree, path)
        if found and found.is_file() and found.stat().st_mode & 0o111:
            return path
    return None


def clock(folder: Path) -> float:
    """Now (seconds since 1970) by the clock that stamps files, a tick behind `time.time`.

    Sets the times of ``folder``. Raises OSError.
    """
    os.utime(folder)
    return folder.stat().st_mtime


def clamp_times(tree: Path, start: float) -> int:
    """Give all that is not older than ``start`` (seconds since 1970) the newest time before it.

    So what a build wrote itself gets a time that is a property of what it read. Returns that time
    in whole seconds. Raises OSError.
    """
    # The clock may have been put back meanwhile; and nothing sets a change time but the clock.
    start = min(start, *(s.st_ctime for _, s in walk(tree)))
    limit = max((int(s.st_mtime) for _, s in walk(tree) if s.st_mtime < start), default=0)
    for path, status in walk(tree):
        if status.st_mtime >= start:
            os.utime(path, (limit, limit), follow_symlinks=False)
    return limit
