"""Translate file system errors of the store into onecopy's errors.

Not here: the paths of the store's files (layout.py).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onecopy.errors import InsufficientResources, NotPermitted, StoreDamaged, as_root
from onecopy.linux.statfs import is_full

# Bytes that suffice for the records of one change: config, manifest, index and lease.
_RECORDS = 1 << 20


def free_bytes(path: Path) -> int:
    """Return the free bytes of a file system for this user (statvfs(3))."""
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def require_disk(path: Path, needed_bytes: int) -> None:
    """Require free space on a file system.

    Raises:
        InsufficientResources: fewer than ``needed_bytes`` are free.
    """
    available = free_bytes(path)
    if available < needed_bytes:
        raise InsufficientResources(
            "disk",
            needed=needed_bytes,
            available=available,
            hint=f"free space on the file system of {path}: `onecopy ls`, `onecopy rm`",
        )


@contextmanager
def file_errors(root: Path) -> Iterator[None]:
    """Translate an OSError of a change to the store at ``root``; other OSErrors pass through.

    Raises:
        InsufficientResources: the disk is full or over quota.
        NotPermitted: this user may not write, or the file system is read-only.
        StoreDamaged: an I/O error.
    """
    try:
        yield
    except OSError as error:
        if is_full(error):
            available = free_bytes(root)
            missing = "space" if os.statvfs(root).f_favail else "inodes (none are free)"
            raise InsufficientResources(
                "disk",
                # The change needed more than is available, even if a quota reports otherwise.
                needed=max(_RECORDS, available + 1),
                available=available,
                hint=f"nothing was stored; free {missing} on the file system of {root}",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise NotPermitted(
                f"cannot change the store {root}: {error.strerror} ({error.filename})",
                hint="run the command as the store's owner, or set ONECOPY_HOME to a directory "
                "of your own",
            ) from error
        if error.errno == errno.EIO:
            raise StoreDamaged(
                f"the disk of the store {root} failed: {error}", hint=as_root("dmesg")
            ) from error
        raise


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable (fsync(2) of the directory)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
