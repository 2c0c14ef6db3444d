"""Leases: a guest's hold on the blobs that it maps. A lease is a lock, not a record.

``leases/HOLDER.json`` lists the blobs. They are held only while a process has the exclusive
flock(2) on that file. QEMU inherits the descriptor, so the kernel drops the lease when QEMU ends,
however it ends. A guest that loads more while it runs gets further leases,
``leases/HOLDER+TAG.json``.

``leases/HOLDER.files/`` has hard links to the blobs that a running VMM receives. A confined VMM may
open these links and no other blob.

Not here: which blobs may be removed (collect.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import msgspec
from msgspec.structs import replace

from onecopy.linux import vmm_registry
from onecopy.linux.lock import flock, is_held
from onecopy.linux.removal import remove_tree
from onecopy.store import oci
from onecopy.store.layout import Layout
from onecopy.store.leftovers import warn

_FILES = ".files"
_FURTHER = "+"
#: The prefix of holders that are not guests, but keep blobs in memory (guest/pagecache/pin.py).
PIN = "pinned-"


class LeaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a lease file.

    Attributes:
        holder: the holder in the file's name, which `rename` may have changed.
        digests: the leased manifests.
        blobs: all blobs that these need, the manifests included.
        info: what the holder wants to be known by.
    """

    holder: str
    digests: tuple[oci.Digest, ...]
    blobs: tuple[oci.Digest, ...]
    names: dict[str, str] = {}
    """Digest of a manifest -> its ``NAME:VERSION`` at the time of the lease."""
    info: dict[str, str] = {}


class Lease(msgspec.Struct):
    """This process's copy of a held lease.

    Pass ``fd`` to the VMM, by ``pass_fds=[lease.fd]`` or over a UNIX socket, and close this copy.
    The lease lives as long as any copy is open.
    """

    record: LeaseRecord
    path: Path
    fd: int
    _open: bool = True

    @property
    def files(self) -> Path:
        """The directory for the holder's links to blobs."""
        return self.path.with_name(f"{self.record.holder}{_FILES}")

    def close(self) -> None:
        """Close this copy, repeatedly if need be; the VMM's copy stays open."""
        # LOCK_UN would drop the lock of all copies.
        if self._open:
            self._open = False
            os.close(self.fd)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        if kind and _FURTHER in self.path.name and not is_held(self.path):
            # The VMM runs but never received this lease, so it must not keep blobs that it does not
            # use.
            self.path.unlink(missing_ok=True)


def path_of(layout: Layout, holder: str) -> Path:
    """Return the path of a holder's first lease, whether or not it exists."""
    return layout.leases / f"{holder}.json"


def further_path(layout: Layout, holder: str) -> Path:
    """Return a new path for a further lease of a holder."""
    return layout.leases / f"{holder}{_FURTHER}{os.urandom(6).hex()}.json"


def remains(layout: Layout, holder: str) -> bool:
    """Whether anything is left of an earlier holder of that name."""
    directory = layout.leases
    return path_of(layout, holder).exists() or (directory / f"{holder}{_FILES}").exists()


def create(layout: Layout, record: LeaseRecord, path: Path) -> Lease:
    """Write and hold a lease; the caller holds the store's lock, and no live lease has the path."""
    # No sync: after a power failure no guest runs, and an unlocked lease has no effect.
    temp = layout.scratch(record.holder, oci.encode(record), 0o444, sync=False)
    # Read-only, so that no VMM can rewrite its lease.
    fd = os.open(temp, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # It is locked before it gets its name, so no process ever sees it unlocked in the meantime.
        flock(fd)
        lease = Lease(record, path, fd)
        lease.files.mkdir(mode=0o700, exist_ok=True)
        temp.replace(path)
    except BaseException:
        os.close(fd)
        temp.unlink(missing_ok=True)
        raise
    return lease


def rename(layout: Layout, holder: str, name: str) -> None:
    """Rename a holder without further leases; the caller holds the store's lock."""
    directory = layout.leases
    (directory / f"{holder}{_FILES}").rename(directory / f"{name}{_FILES}")
    path_of(layout, holder).rename(path_of(layout, name))
    vmm_registry.rename(layout.root, holder, name)


def scan(layout: Layout) -> tuple[list[LeaseRecord], list[Path]]:
    """Return the records of the held leases by holder, and the files of all others.

    Raises:
        StoreDamaged: the record of a held lease cannot be read.
    """
    held, stale = _partition(layout)
    return [record for path in held if (record := _read(path))], stale


def any_stale(layout: Layout) -> bool:
    """Whether a holder that has ended left a lease file."""
    return bool(_partition(layout)[1] or _unused_directories(layout))


def is_live(layout: Layout, holder: str) -> bool:
    """Whether ``holder`` has a live lease."""
    return is_held(path_of(layout, holder)) or vmm_registry.holds(layout.root, holder)


def _partition(layout: Layout) -> tuple[list[Path], list[Path]]:
    """Return the lease files that are held, and those that are not."""
    paths = sorted(_files(layout))
    free = {path for path in paths if not is_held(path)}
    if free:
        alive = vmm_registry.holders(layout.root)
        free = {path for path in free if _holder(path) not in alive}
    return [path for path in paths if path not in free], sorted(free)


def _holder(path: Path) -> str:
    return path.stem.partition(_FURTHER)[0]


def remove_directories(layout: Layout) -> None:
    """Remove the directories of holders that have ended; the caller holds the store's lock."""
    for directory in _unused_directories(layout):
        warn(directory, remove_tree(directory))


def _unused_directories(layout: Layout) -> list[Path]:
    unused = {
        directory.name.removesuffix(_FILES): directory
        for directory in layout.leases.glob(f"*{_FILES}")
        if not is_held(path_of(layout, directory.name.removesuffix(_FILES)))
    }
    alive = vmm_registry.holders(layout.root) if unused else set()
    return [directory for holder, directory in unused.items() if holder not in alive]


def _files(layout: Layout) -> list[Path]:
    return [path for path in layout.leases.iterdir() if path.suffix == ".json"]


def _read(path: Path) -> LeaseRecord | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        # Its holder ended and a sweep removed it meanwhile.
        return None
    hint = "stop the guest of that name, then delete the file"
    record = oci.decode(data, LeaseRecord, path, hint)
    return replace(record, holder=_holder(path))
