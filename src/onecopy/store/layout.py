"""Where the store's files lie, its lock, and how one file is changed whole or not at all.

::

    ROOT/oci-layout, index.json, blobs/sha256/HEX     an OCI image layout (image-layout.md)
    ROOT/lock              flock(2)ed by whoever changes anything ROOT/tmp/FOLDER        a
    workspace, flocked by its owner (workspace.py) ROOT/tmp/FILE          lives only while its
    writer has ``lock``: else it is a crash's remains ROOT/leases/NAME.json  flocked by the guest
    that holds it (lease.py) ROOT/live/             what the host writes to and guests read
    (live.py) ROOT/reserve/          what a change takes where nothing is left (reserve.py)
    ROOT/cache/            what can be made again; may be emptied at any time ROOT/disks/
    of guests (guest/lifecycle/disks.py); nothing else in the store knows of them

Not here: how a store is first made (opening.py), what the files say (oci.py), which of them are
wanted (collect.py).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from onecopy.store.disk import sync_folder

#: A link there would have somebody else's file opened.
_LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def default_root() -> Path:
    """``$ONECOPY_HOME``, else /var/lib/onecopy for root, else onecopy in the XDG data folder."""
    if home := os.environ.get("ONECOPY_HOME"):
        return Path(home)
    if os.geteuid() == 0:
        return Path("/var/lib/onecopy")
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "onecopy"


class Layout(msgspec.Struct, frozen=True):
    """The paths of the store ``root`` (absolute), its lock, and safe writes."""

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
        """Where the blob ``digest`` lies, if it is there."""
        return self.blobs / digest.removeprefix("sha256:")

    @contextmanager
    def locked(self, *, wait: bool = True) -> Iterator[bool]:
        """Hold the store's lock; not reentrant. With ``wait=False`` yields False if it is taken."""
        fd = os.open(self.root / "lock", _LOCK, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            try:
                yield True
            finally:
                # Not left to close(): a child forked meanwhile has a copy of the descriptor.
                fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            os.close(fd)

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        """Make ``path`` hold ``data``, whole or not at all, durable at return; lock held."""
        temp = self.scratch(path.name, data, mode, sync=True)
        temp.replace(path)
        sync_folder(path.parent)

    def scratch(self, name: str, data: bytes, mode: int, *, sync: bool) -> Path:
        """A new file in tmp/ that holds ``data``; lock held, so a plain name will do."""
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
