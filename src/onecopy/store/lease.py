"""Leases: a guest's hold on what it maps. Locks, not records.

``leases/HOLDER.json`` says what is held; it *is* held only while a process has the exclusive
flock(2) on it. QEMU inherits the descriptor, so the kernel drops the lease when QEMU dies, however
it dies. A guest that loads more while it runs gets further leases, ``leases/HOLDER+TAG.json``.

``leases/HOLDER.files/`` has hard links to the blobs that a running VMM is given: a confined VMM may
open what lies there, and no other blob. Not here: which blobs may go (collect.py).
"""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path
from types import TracebackType

import msgspec
from msgspec.structs import replace

from onecopy.linux import vmm_registry
from onecopy.linux.lock import is_held
from onecopy.linux.removal import remove_tree
from onecopy.store import oci
from onecopy.store.layout import Layout
from onecopy.store.leftovers import tell

_FILES = ".files"
_FURTHER = "+"
#: How holders begin that are no guests but keep blobs in memory (guest/pagecache/pin.py).
PIN = "pinned-"


class LeaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a lease file says.

    ``holder`` is the file's name, whoever the lease was made for (`rename`). ``digests`` are
    manifests, ``blobs`` all that these need (themselves included), ``info`` is whatever the holder
    wants to be known by.
    """

    holder: str
    digests: tuple[oci.Digest, ...]
    blobs: tuple[oci.Digest, ...]
    names: dict[str, str] = {}
    """Digest of a manifest -> ``NAME:VERSION`` that it had when it was leased."""
    info: dict[str, str] = {}


class Lease(msgspec.Struct):
    """Our copy of a held lease.

    Give ``fd`` to the VMM (``pass_fds=[lease.fd]``, which makes it inheritable there, or over a
    UNIX socket), then close this copy: the lease lives as long as any copy is open.
    """

    record: LeaseRecord
    path: Path
    fd: int
    _open: bool = True

    @property
    def files(self) -> Path:
        """Its holder's folder for links to blobs."""
        return self.path.with_name(f"{self.record.holder}{_FILES}")

    def close(self) -> None:
        """Close our copy, as often as you like; the VMM's stays."""
        # Never LOCK_UN: that would drop the lock of every copy.
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
            # Never given to the VMM, which lives: it would keep what it does not use.
            self.path.unlink(missing_ok=True)


def path_of(layout: Layout, holder: str) -> Path:
    """Where the lease of ``holder`` lies, if there is one."""
    return layout.leases / f"{holder}.json"


def further_path(layout: Layout, holder: str) -> Path:
    """Where a new further lease of ``holder`` lies."""
    return layout.leases / f"{holder}{_FURTHER}{secrets.token_hex(6)}.json"


def remains(layout: Layout, holder: str) -> bool:
    """Whether anything is left of an earlier holder of that name."""
    folder = layout.leases
    return path_of(layout, holder).exists() or (folder / f"{holder}{_FILES}").exists()


def create(layout: Layout, record: LeaseRecord, path: Path) -> Lease:
    """Write and hold a lease; the store's lock is held and no live lease has the name."""
    # Not synced: after a power cut no guest lives, and an unheld lease means nothing.
    temp = layout.scratch(record.holder, oci.encode(record), 0o444, sync=False)
    # Read-only, so that no VMM can rewrite what it holds.
    fd = os.open(temp, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Locked before it has its name: nobody ever sees it free while we live.
        fcntl.flock(fd, fcntl.LOCK_EX)
        lease = Lease(record, path, fd)
        lease.files.mkdir(mode=0o700, exist_ok=True)
        temp.replace(path)
    except BaseException:
        os.close(fd)
        temp.unlink(missing_ok=True)
        raise
    return lease


def rename(layout: Layout, holder: str, name: str) -> None:
    """Let a holder without further leases have another name; the store's lock is held."""
    folder = layout.leases
    (folder / f"{holder}{_FILES}").rename(folder / f"{name}{_FILES}")
    path_of(layout, holder).rename(path_of(layout, name))
    vmm_registry.rename(layout.root, holder, name)


def scan(layout: Layout) -> tuple[list[LeaseRecord], list[Path]]:
    """The leases that are held now, by holder, and the files of those that are not.

    Raises StoreDamaged for a held one that cannot be read.
    """
    held, stale = _sorted_out(layout)
    return [record for path in held if (record := _read(path))], stale


def any_stale(layout: Layout) -> bool:
    """Whether a lease file is left of a holder that ended."""
    return bool(_sorted_out(layout)[1] or _unused_folders(layout))


def is_live(layout: Layout, holder: str) -> bool:
    """Whether ``holder`` has a live lease."""
    return is_held(path_of(layout, holder)) or vmm_registry.holds(layout.root, holder)


def _sorted_out(layout: Layout) -> tuple[list[Path], list[Path]]:
    """The lease files that are held, and those that are not."""
    paths = sorted(_files(layout))
    free = {path for path in paths if not is_held(path)}
    if free:
        living = vmm_registry.holders(layout.root)
        free = {path for path in free if _holder(path) not in living}
    return [path for path in paths if path not in free], sorted(free)


def _holder(path: Path) -> str:
    return path.stem.partition(_FURTHER)[0]


def remove_folders(layout: Layout) -> None:
    """Remove the folders of holders that ended; the store's lock is held."""
    for folder in _unused_folders(layout):
        tell(folder, remove_tree(folder))


def _unused_folders(layout: Layout) -> list[Path]:
    unused = {
        folder.name.removesuffix(_FILES): folder
        for folder in layout.leases.glob(f"*{_FILES}")
        if not is_held(path_of(layout, folder.name.removesuffix(_FILES)))
    }
    living = vmm_registry.holders(layout.root) if unused else set()
    return [folder for holder, folder in unused.items() if holder not in living]


def _files(layout: Layout) -> list[Path]:
    return [path for path in layout.leases.iterdir() if path.suffix == ".json"]


def _read(path: Path) -> LeaseRecord | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        # Its holder ended and it was swept since we looked.
        return None
    hint = "stop the guest of that name, then delete the file"
    record = oci.decode(data, LeaseRecord, path, hint)
    return replace(record, holder=_holder(path))
