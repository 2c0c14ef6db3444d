"""What lets a full store still be changed: two files that were made while there was room.

A removal writes, too: the mark of a change, and the new index. Where no block or no inode is left
for them, the files of the reserve are renamed into their place and written over. That asks the file
system for nothing, and nobody who fills it can come in between. Not here: the change (change.py).
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from onecopy.store.disk import sync_folder
from onecopy.store.layout import Layout

MARK, INDEX = "mark", "index"
#: Bytes that the index may grow by, as names are given on a full disk: a name takes some 400.
_ROOM = 32 << 10


def is_full(error: OSError) -> bool:
    """Whether ``error`` says that no block or no inode is left, for all or for this user."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def take(layout: Layout, name: str, path: Path) -> bool:
    """Move a file of the reserve to ``path``; False if it is gone. The lock is held."""
    with suppress(FileNotFoundError):
        (layout.reserve / name).rename(path)
        return True
    return False


def write(layout: Layout, path: Path, data: bytes, mode: int = 0o644) -> bool:
    """As `Layout.write`, in the reserve's blocks; False if these are too few. The lock is held."""
    temp = layout.tmp / f"{path.name}.new"
    if not _has(layout.reserve / INDEX, len(data)) or not take(layout, INDEX, temp):
        return False
    # Not emptied before: that would give its blocks away.
    with temp.open("r+b", buffering=0) as file:
        os.fchmod(file.fileno(), mode)
        file.write(data)
        file.truncate(len(data))
        os.fsync(file.fileno())
    temp.replace(path)
    sync_folder(path.parent)
    return True


def keep(layout: Layout) -> None:
    """Make what is missing of the reserve, if there is room; the lock is held."""
    # What stays of it after a power cut is seen by its size; after a kill it is in tmp/.
    with suppress(OSError):
        layout.reserve.mkdir(mode=0o700, exist_ok=True)
        _make(layout, MARK, 0, 0)
        size = layout.index.stat().st_size
        _make(layout, INDEX, size + _ROOM // 2, size + _ROOM)


def _make(layout: Layout, name: str, least: int, size: int) -> None:
    path = layout.reserve / name
    if not _has(path, least):
        # Bytes that no file system makes a hole of, or compresses.
        layout.scratch(f"reserve-{name}", os.urandom(size), 0o600, sync=False).replace(path)


def _has(path: Path, size: int) -> bool:
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    return min(status.st_size, status.st_blocks * 512) >= size
