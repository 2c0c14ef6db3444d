"""The reserve: two files, created while there is space, that allow changes to a full store.

Even a removal writes the marker of the change and a new index. If no block or inode is left for
them, files of the reserve are renamed into place and overwritten. This allocates nothing, so
another process that fills the disk cannot interfere.

Not here: the change (change.py).
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from onecopy.store.disk import sync_directory
from onecopy.store.layout import Layout

MARK, INDEX = "mark", "index"
#: Bytes by which the index may grow as names are given on a full disk; one takes about 400.
_GROWTH = 32 << 10


def take(layout: Layout, name: str, path: Path) -> bool:
    """Move a file of the reserve to ``path``; the caller holds the lock.

    Returns:
        False if the file is gone."""
    with suppress(FileNotFoundError):
        (layout.reserve / name).rename(path)
        return True
    return False


def write(layout: Layout, path: Path, data: bytes, mode: int = 0o644) -> bool:
    """Write like `Layout.write`, but into the blocks of the reserve; the caller holds the lock.

    Returns:
        False if the reserve is too small.
    """
    temp = layout.tmp / f"{path.name}.new"
    if not _has(layout.reserve / INDEX, len(data)) or not take(layout, INDEX, temp):
        return False
    # Truncating it first would give up its blocks.
    with temp.open("r+b", buffering=0) as file:
        os.fchmod(file.fileno(), mode)
        file.write(data)
        file.truncate(len(data))
        os.fsync(file.fileno())
    temp.replace(path)
    sync_directory(path.parent)
    return True


def refill(layout: Layout) -> None:
    """Create missing files of the reserve if there is space; the caller holds the lock."""
    # Remains after a power failure are recognised by their size; after a kill they are in tmp/.
    with suppress(OSError):
        layout.reserve.mkdir(mode=0o700, exist_ok=True)
        _make(layout, MARK, 0, 0)
        size = layout.index.stat().st_size
        _make(layout, INDEX, size + _GROWTH // 2, size + _GROWTH)


def _make(layout: Layout, name: str, minimum: int, size: int) -> None:
    path = layout.reserve / name
    if not _has(path, minimum):
        # Random bytes, which no file system turns into holes or compresses.
        layout.scratch(f"reserve-{name}", os.urandom(size), 0o600, sync=False).replace(path)


def _has(path: Path, size: int) -> bool:
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    return min(status.st_size, status.st_blocks * 512) >= size
