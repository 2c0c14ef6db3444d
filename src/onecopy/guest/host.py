"""The host as guests see it: its store, its QEMU, and the run folders of its guests."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from onecopy.errors import NotFound
from onecopy.guest.folder import (
    Batch,
    GuestFolder,
    GuestRecord,
    is_mark,
    kill,
    lock_mark,
    run_root,
)
from onecopy.host.lock import is_held
from onecopy.host.process import is_same
from onecopy.store import Lease, Store
from onecopy.vmm.qemu import Qemu, probe


@dataclass(frozen=True)
class Host:
    """One store and the guests that run from it."""

    store: Store
    run: Path

    @classmethod
    def open(cls, root: Path | None = None) -> Host:
        """Open the store (default: store.default_root()) and sweep what dead commands left."""
        store = Store(root)
        host = cls(store, run_root(store))
        host.run.mkdir(parents=True, exist_ok=True, mode=0o700)
        host.sweep()
        return host

    @cached_property
    def qemu(self) -> Qemu:
        """This host's QEMU."""
        return probe(self.store.cache)

    def guest(self, name: str) -> GuestFolder:
        """The folder of a running guest; raise NotFound."""
        folder = GuestFolder(self.run / name)
        folder.record()
        return folder

    def guests(self) -> list[GuestRecord]:
        """All guests that were handed out and whose VMM lives, by name."""
        records = []
        for path in self._folders():
            with contextlib.suppress(NotFound):
                records.append(GuestFolder(path).record())
        return sorted(records, key=lambda record: record.name)

    @contextlib.contextmanager
    def batch(self) -> Iterator[Batch]:
        """What the guests that are started meanwhile belong to; the caller hands them out.

        Killed before, the command leaves guests that the next one ends.
        """
        with self._locked():
            mark, fd = lock_mark(self.run)
        try:
            yield Batch(mark)
        finally:
            mark.unlink(missing_ok=True)
            os.close(fd)

    @contextlib.contextmanager
    def starting(self, batch: Batch | None) -> Iterator[Batch]:
        """``batch``, or one for a single guest, which is handed out at the end."""
        if batch:
            yield batch
            return
        with self.batch() as own:
            yield own
            own.hand_out()

    @contextlib.contextmanager
    def claim(
        self, name: str, digests: Sequence[str], batch: Batch
    ) -> Iterator[tuple[GuestFolder, Lease]]:
        """A new guest's run folder and lease; raise AlreadyExists if the name is taken.

        Our copy of the lease is closed at the end. If that is an error nothing is left behind, but
        for the VMM, which is the caller's to end.
        """
        with contextlib.ExitStack() as stack:
            with self._locked():
                lease = stack.enter_context(self.store.hold(digests, name, {}))
                folder = batch.add(self.run / name)
            try:
                yield folder, lease
            except BaseException:
                folder.remove()
                raise

    def end(self, record: GuestRecord) -> None:
        """End a guest's VMM, unasked, and remove its folder."""
        # Not by its command line: that is its own memory, which it may change.
        kill(record.pid, lambda: is_same(record.pid, record.start_ticks))
        GuestFolder(self.run / record.name).remove()

    def sweep(self) -> None:
        """Remove what no living command or VMM owns: folders, and guests never handed out."""
        killed = False
        with self._locked():
            for path in self._folders():
                folder = GuestFolder(path)
                if self.store.is_held(path.name):
                    if not folder.abandoned:
                        continue
                    vmm = folder.find_vmm()
                    if vmm is not None:
                        kill(vmm, partial(_is_vmm, folder, vmm))
                        killed = True
                folder.remove()
            for path in filter(is_mark, self.run.iterdir()):
                if not is_held(path):
                    path.unlink()
        if killed:
            # Their leases are stale only now.
            self.store.sweep()

    def _folders(self) -> list[Path]:
        return [path for path in self.run.iterdir() if path.is_dir()]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Between claiming a name and having its folder nobody may sweep."""
        fd = os.open(self.run / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _is_vmm(folder: GuestFolder, pid: int) -> bool:
    return folder.find_vmm() == pid
