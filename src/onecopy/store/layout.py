"""The paths of the store's files, the store's lock, and atomic writes.

    ROOT/oci-layout, index.json, blobs/sha256/HEX
                             an OCI image layout (image-layout.md)
    ROOT/lock                flock(2)ed during every change
    ROOT/tmp/DIRECTORY       a workspace, flocked by its owner (workspace.py)
    ROOT/tmp/FILE            exists while its writer has ``lock``; otherwise left by a crash
    ROOT/leases/NAME.json    flocked by the guest that holds it (lease.py)
    ROOT/live/               files that the host writes and guests read (live.py)
    ROOT/reserve/            files that a change uses on a full disk (reserve.py)
    ROOT/cache/              can be recreated; may be emptied at any time
    ROOT/disks/              disks of guests (guest/lifecycle/disks.py), unknown to the store

Not here: how a store is created (opening.py), what the files contain (oci.py), and which are needed
(collect.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from onecopy.linux.lock import flock, unlock
from onecopy.store.disk import sync_directory

#: O_NOFOLLOW: through a symbolic link another user's file would be opened.
_LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def default_root() -> Path:
    """Return ``$ONECOPY_HOME``, else /var/lib/onecopy for root, else onecopy in $XDG_DATA_HOME."""
    if home := os.environ.get("ONECOPY_HOME"):
        return Path(home)
    if os.geteuid() == 0:
        return Path("/var/lib/onecopy")
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "onecopy"


class Layout(msgspec.Struct, frozen=True):
    """The paths of the store at ``root`` (absolute), its lock, and atomic writes."""

    root: Path

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def leases(self) -> Path:
        return self.root / "leases"

    @property
    def live(self) -> Path:
        return self.root / "live"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def reserve(self) -> Path:
        return self.root / "reserve"

    @property
    def blobs(self) -> Path:
        return self.root / "blobs" / "sha256"

    @property
    def index(self) -> Path:
        return self.root / "index.json"

    @property
    def mark(self) -> Path:
        return self.root / "oci-layout"

    def blob(self, digest: str) -> Path:
        """Return the path of a blob, whether or not it exists."""
        return self.blobs / digest.removeprefix("sha256:")

    @contextmanager
    def locked(self, *, wait: bool = True) -> Iterator[bool]:
        """Hold the store's lock, which is not reentrant.

        Args:
            wait: wait for the lock; if False and the lock is taken, yield False.
        """
        fd = os.open(self.root / "lock", _LOCK, 0o600)
        try:
            if not flock(fd, wait=wait):
                yield False
                return
            try:
                yield True
            finally:
                unlock(fd)
        finally:
            os.close(fd)

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        """Replace a file atomically and durably; the caller holds the lock."""
        temp = self.scratch(path.name, data, mode, sync=True)
        temp.replace(path)
        sync_directory(path.parent)

    def scratch(self, name: str, data: bytes, mode: int, *, sync: bool) -> Path:
        """Write a new file in tmp/; the caller holds the lock, so the name need not be unique."""
        temp = self.tmp / f"{name}.new"
        temp.unlink(missing_ok=True)
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(fd)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
        return temp
