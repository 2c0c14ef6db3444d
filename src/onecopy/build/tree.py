"""What a folder tree holds, found by reading its metadata; and times put right in one.

Not here: turning a tree into an image (image.py).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from onecopy.errors import BadSource
from onecopy.model import PAGE_SIZE

# path_resolution(7) gives up after as many links.
_MAX_LINKS = 40


class Facts(msgspec.Struct, frozen=True):
    """What `scan` found.

    ``newest`` is the newest modification time in whole seconds since 1970; ``inodes`` and
    ``blocks`` (of `PAGE_SIZE`, holes counted as data) bound what an image of it takes;
    ``longest_name`` is in bytes; ``fingerprint`` changes when anything in the tree does.
    """

    newest: int
    inodes: int
    blocks: int
    longest_name: int
    fingerprint: str


def walk(tree: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Path and lstat(2) of ``tree`` and all below it, in an order that only names decide.

    Raises OSError.
    """
    pending = [tree]
    while pending:
        path = pending.pop()
        status = path.lstat()
        yield path, status
        if stat.S_ISDIR(status.st_mode):
            pending += sorted(path.iterdir(), reverse=True)


def scan(tree: Path) -> Facts:
    """Read the metadata of ``tree``.

    Raises BadSource if something cannot be read, vanishes, or is a folder of another file system
    (a mounted /proc has no business in an image).
    """
    try:
        return _scan(tree)
    except OSError as error:
        where = os.fsdecode(error.filename or "")
        where = where if len(where) <= 255 else f"{where[:64]}[...]"
        raise BadSource(
            f"cannot read {where}: {error.strerror}",
            hint="nothing may change in it meanwhile; run as root if it belongs to others",
        ) from error


def _scan(tree: Path) -> Facts:
    digest = hashlib.sha256()
    linked: set[int] = set()
    newest = inodes = blocks = longest = names = 0
    device = tree.lstat().st_dev
    for path, status in walk(tree):
        digest.update(repr((os.fsencode(path), *_identity(status))).encode())
        newest = max(newest, int(status.st_mtime))
        name = len(os.fsencode(path.name))
        longest = max(longest, name)
        # A folder's entry is 8 bytes and the name, rounded up to 4.
        names += name + 11
        is_folder = stat.S_ISDIR(status.st_mode)
        if is_folder and status.st_dev != device:
            raise BadSource(
                f"{path} is on another file system", hint="unmount it, or copy the folder first"
            )
        if not is_folder and status.st_nlink > 1:
            if status.st_ino in linked:
                continue
            linked.add(status.st_ino)
        inodes += 1
        blocks += _blocks(path, status)
    # Entries do not cross blocks, so each block may lose up to the longest entry.
    blocks += names // (PAGE_SIZE - 264)
    return Facts(newest, inodes, blocks, longest, digest.hexdigest())


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


def _blocks(path: Path, status: os.stat_result) -> int:
    """Blocks that the inode takes at most: content, ext2's indirect blocks, attributes."""
    blocks = 1 if os.listxattr(path, follow_symlinks=False) else 0
    if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
        data = -(-status.st_size // PAGE_SIZE)
        return blocks + data + (data // 1000 + 3 if data > 12 else 0)
    return blocks + 1


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
    limit = max((int(s.st_mtime) for _, s in walk(tree) if s.st_mtime < start), default=0)
    for path, status in walk(tree):
        if status.st_mtime >= start:
            os.utime(path, (limit, limit), follow_symlinks=False)
    return limit
