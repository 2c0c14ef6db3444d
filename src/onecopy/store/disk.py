"""What a file system can refuse, said in onecopy's errors.

Not here: where the store's files lie (layout.py).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onecopy.errors import InsufficientResources, NotPermitted, StoreDamaged, as_root

# The records of one change (config, manifest, index, lease) fit in this; bytes.
_RECORDS = 1 << 20


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write to the file system of ``path`` (statvfs(3))."""
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def require_disk(path: Path, needed_bytes: int) -> None:
    """Raise InsufficientResources if ``path``'s file system has not ``needed_bytes`` free."""
    available = free_bytes(path)
    if available < needed_bytes:
        raise InsufficientResources(
            "disk",
            needed=needed_bytes,
            available=available,
            hint=f"free some space on the file system of {path}: `onecopy ls`, `onecopy rm`",
        )


@contextmanager
def file_errors(root: Path) -> Iterator[None]:
    """Turn an OSError of a change to the store ``root`` into one of ours.

    Raises InsufficientResources (full, over quota), NotPermitted (rights, read-only), StoreDamaged
    (I/O error); any other OSError passes.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            available = free_bytes(root)
            left = "some space" if os.statvfs(root).f_favail else "some files (no inode is left)"
            raise InsufficientResources(
                "disk",
                # What we needed was more than there is, though a quota may say otherwise.
                needed=max(_RECORDS, available + 1),
                available=available,
                hint=f"nothing was stored; free {left} on the file system of {root}",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise NotPermitted(
                f"the store {root} cannot be changed: {error.strerror} ({error.filename})",
                hint="become the user who owns it, or set ONECOPY_HOME to a folder of your own",
            ) from error
        if error.errno == errno.EIO:
            raise StoreDamaged(
                f"the disk under the store {root} failed: {error}", hint=as_root("dmesg")
            ) from error
        raise


def sync_folder(path: Path) -> None:
    """Make the names in ``path`` durable (fsync(2) of the folder)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
