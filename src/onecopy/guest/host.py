"""The host as guests see it: its store, its QEMU, and the run folders of its guests."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path

import msgspec
from msgspec.structs import replace

from onecopy.errors import NotFound
from onecopy.guest.folder import (
    POOL,
    Batch,
    GuestFolder,
    GuestRecord,
    find_vmms,
    is_mark,
    is_vmm,
    kill,
    lock_mark,
    run_root,
)
from onecopy.guest.pause import resume
from onecopy.host import cgroup
from onecopy.host.lock import alone, is_left
from onecopy.host.process import is_same
from onecopy.model import in_order
from onecopy.sharing import check
from onecopy.store import Lease, Store
from onecopy.vmm import logs, resolver
from onecopy.vmm.qemu import Qemu, probe


class Host(msgspec.Struct, frozen=True, dict=True):
    """One store and the guests that run from it."""

    store: Store
    run: Path
    batch_seen: Batch | None = None
    """Guests that are being started, and that this host shows all the same."""

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
        folder = GuestFolder(self.run / name, self.batch_seen)
        folder.record()
        return folder

    def guest_with_agent(self, name: str) -> GuestFolder:
        """The same, if something is to be done inside it; raise AgentFailed of a bare machine."""
        folder = GuestFolder(self.run / name, self.batch_seen)
        folder.require_agent()
        return folder

    def seeing(self, batch: Batch) -> Host:
        """This host for who starts guests, and does with one of them what others do later."""
        return replace(self, batch_seen=batch)

    def guests(self) -> list[GuestRecord]:
        """All guests that were handed out and whose VMM lives, by name."""
        return self._records(self._folders())

    def owned(self, owner: Path) -> list[GuestRecord]:
        """The guests that end with an owner."""
        return self._records(path for path in self._folders() if GuestFolder(path).owner == owner)

    def vmms(self, names: Iterable[str]) -> list[tuple[str, int]]:
        """(guest, process id of its VMM) of those of ``names`` that run or are being started."""
        return list(find_vmms((self.run / name).resolve() for name in names))

    def unloaded(self, segment: str) -> set[str]:
        """The guests that have a segment (digest of its manifest) but have unloaded it."""
        return {
            record.name
            for record in self.guests()
            for item in record.attached
            if item.digest == segment and item.state == "kept"
        }

    @contextlib.contextmanager
    def batch(self, owner: Path | None = None) -> Iterator[Batch]:
        """What the guests that are started meanwhile belong to; the caller hands them out.

        Killed before, the command leaves guests that the next one ends. So it does later with those
        of an ``owner``.
        """
        with self._marked("starting") as mark:
            yield Batch(mark, owner)

    def owner(self) -> AbstractContextManager[Path]:
        """What guests belong to that are not to outlive this process, however that ends.

        The next command ends those that are left.
        """
        return self._marked("owner")

    @contextlib.contextmanager
    def _marked(self, kind: str) -> Iterator[Path]:
        with self.locked():
            mark, fd = lock_mark(self.run, kind)
        try:
            yield mark
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
            with self.locked():
                if not self._folders():
                    check.note(self.memory_before)
                lease = stack.enter_context(self.store.hold(digests, name, {}))
                folder = batch.add(self.run / name)
            try:
                yield folder, lease
            except BaseException:
                self.drop(folder)
                raise

    def prepared(self) -> list[GuestRecord]:
        """What waits to become guests (pool.py), by name."""
        found = (
            GuestFolder(path).prepared()
            for path in self._folders()
            if path.name.startswith(POOL) and self.store.is_held(path.name)
        )
        return sorted(filter(None, found), key=lambda record: in_order(record.name))

    @contextlib.contextmanager
    def taking(
        self,
        digest: str,
        name: str,
        batch: Batch,
        suits: Callable[[GuestRecord], bool] = lambda _: True,
    ) -> Iterator[tuple[GuestFolder, GuestRecord] | None]:
        """What was prepared from ``digest``, and suits, in the run folder of a new guest, or None.

        If that ends in an error nothing is left behind, but for the VMM, which the caller ends.
        """
        with self.locked():
            suiting = (each for each in self.prepared() if each.digest == digest and suits(each))
            taken = self._take(next(suiting, None), name, batch)
        try:
            yield taken
        except BaseException:
            if taken:
                self.drop(taken[0])
            raise

    def _take(
        self, record: GuestRecord | None, name: str, batch: Batch
    ) -> tuple[GuestFolder, GuestRecord] | None:
        if not record or self.store.is_held(name):
            return None
        # Killed after this, we leave it to the next command, by whatever name it goes then.
        batch.join(self.run / record.name)
        self.store.rename_holder(record.name, name)
        GuestFolder(self.run / name).remove()
        (self.run / record.name).rename(self.run / name)
        return GuestFolder(self.run / name, batch), record

    def end(self, *records: GuestRecord) -> None:
        """End the VMMs of guests, unasked; remove their folders, and leases that nobody holds."""
        # Not by their command lines: these are their own memory, which they may change.
        kill((each.pid, partial(is_same, each.pid, each.start_ticks)) for each in records)
        self.drop(*(GuestFolder(self.run / each.name) for each in records))
        self.store.sweep()

    def sweep(self) -> None:
        """Remove what no living command or VMM owns: folders, and guests never handed out."""
        with self.locked():
            abandoned, left = [], []
            for path in self._folders():
                folder = GuestFolder(path)
                if folder.abandoned:
                    # Its lease may have another name already (_take).
                    abandoned.append(folder)
                elif not self.store.is_held(path.name):
                    left.append(folder)
                elif folder.left_paused:
                    resume(path)
                elif logs.are_filling(path):
                    self._make_room(folder)
            if abandoned:
                vmms = self.vmms(folder.name for folder in abandoned)
                kill((pid, partial(is_vmm, (self.run / name).resolve(), pid)) for name, pid in vmms)
            for path in filter(is_mark, self.run.iterdir()):
                if is_left(path):
                    path.unlink()
            self._remove(*left, *abandoned)
        if abandoned:
            # Their leases are stale only now.
            self.store.sweep()
        cgroup.sweep()
        resolver.refresh(self.run)

    def _make_room(self, folder: GuestFolder) -> None:
        """Let the logs of a guest go on; under lock."""
        with contextlib.suppress(NotFound, OSError):
            logs.make_room(folder.path, folder.record().pid)

    def keep_logging(self, folder: GuestFolder) -> None:
        """Let the logs of a guest go on, without what is oldest, if they are full."""
        if logs.are_filling(folder.path):
            with self.locked():
                self._make_room(folder)

    def drop(self, *folders: GuestFolder) -> None:
        """Remove the run folders of VMMs that have ended, or are the caller's to end."""
        with self.locked():
            self._remove(*folders)

    def _remove(self, *folders: GuestFolder) -> None:
        """Remove run folders, and with the last what was noted at the first start; under lock."""
        for folder in folders:
            folder.remove()
        if not self._folders():
            self.memory_before.unlink(missing_ok=True)
            resolver.forget(self.run)

    @property
    def memory_before(self) -> Path:
        """Where the host's memory is noted when the first guest starts (sharing/check.py)."""
        return self.run / ".before"

    def next_number(self) -> int:
        """A number that no guest has had since the host was booted."""
        with self.locked() as lock:
            number = int(os.pread(lock, 20, 0) or b"0")
            os.pwrite(lock, str(number + 1).encode(), 0)
        return number

    def _records(self, folders: Iterable[Path]) -> list[GuestRecord]:
        records = []
        for path in folders:
            with contextlib.suppress(NotFound):
                records.append(GuestFolder(path).record())
        return sorted(records, key=lambda record: in_order(record.name))

    def _folders(self) -> list[Path]:
        found = (path for path in self.run.iterdir() if not path.name.startswith("."))
        return [path for path in found if path.is_dir()]

    @contextlib.contextmanager
    def locked(self) -> Iterator[int]:
        """Between claiming a name and having its folder nobody may sweep.

        The lock's file, whose descriptor this yields, has the number of the next guest.
        """
        with alone(self.run / ".lock") as fd:
            yield fd
