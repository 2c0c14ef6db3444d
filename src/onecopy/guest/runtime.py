"""The host as guests see it: its store, its QEMU, and the run folders of its guests."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

import msgspec
from msgspec.structs import replace

from onecopy.errors import Incompatible, NotFound
from onecopy.guest import ended_guests
from onecopy.guest.run_directory import (
    POOL,
    Batch,
    GuestRecord,
    RunDirectory,
    find_vmms,
    lock_mark,
    run_root,
)
from onecopy.guest.sweep import preserve, sweep
from onecopy.linux import cgroup, files, vmm_registry
from onecopy.linux.lock import alone
from onecopy.linux.run_base import make_own, make_run_base
from onecopy.linux.vmm_registry import Entry, Process
from onecopy.model import in_order
from onecopy.sharing import cross_check
from onecopy.store import Lease, Store
from onecopy.vmm import logs, name_servers
from onecopy.vmm.qemu import Qemu, probe


class Runtime(msgspec.Struct, frozen=True, dict=True):
    """One store and the guests that run from it."""

    store: Store
    run: Path
    batch_seen: Batch | None = None
    """Guests that are being started, and that this host shows all the same."""

    @classmethod
    def open(cls, root: Path | None = None) -> Runtime:
        """Open the store (default: store.default_root()) and sweep what dead commands left."""
        make_run_base()
        store = Store(root)
        host = cls(store, run_root(store))
        host.make_run()
        host.sweep()
        return host

    @cached_property
    def qemu(self) -> Qemu:
        """This host's QEMU."""
        return probe(self.store.cache)

    def guest(self, name: str) -> RunDirectory:
        """The folder of a running guest; raise NotFound."""
        folder = RunDirectory(self.run / name, self.batch_seen)
        with self._knowing_ended(name):
            folder.record()
        return folder

    def guest_with_agent(self, name: str) -> RunDirectory:
        """The same, if something is to be done inside it; raise AgentFailed of a bare machine."""
        folder = RunDirectory(self.run / name, self.batch_seen)
        with self._knowing_ended(name):
            folder.require_agent()
        return folder

    @contextlib.contextmanager
    def _knowing_ended(self, name: str) -> Iterator[None]:
        """Say of a guest that is not there that it has ended, and why, if that is known."""
        try:
            yield
        except NotFound:
            if record := ended_guests.find(self.run, name):
                raise ended_guests.no_more(record) from None
            raise

    def ended(self) -> list[GuestRecord]:
        """The guests that ended by themselves and are still known, by name."""
        return ended_guests.records(self.run)

    def forget(self, *names: str) -> None:
        """Remove what is kept of guests that ended by themselves."""
        with self.locked():
            ended_guests.forget(self.run, *names)

    def seeing(self, batch: Batch) -> Runtime:
        """This host for who starts guests, and does with one of them what others do later."""
        return replace(self, batch_seen=batch)

    def guests(self) -> list[GuestRecord]:
        """All guests that were handed out and whose VMM lives, by name."""
        return self._records(self.folders())

    def owned(self, owner: Path) -> list[GuestRecord]:
        """The guests that end with an owner."""
        return self._records(path for path in self.folders() if RunDirectory(path).owner == owner)

    def vmms(self, names: Iterable[str]) -> list[tuple[str, int]]:
        """(guest, process id of its VMM) of those of ``names`` that run or are being started."""
        return [(name, process.pid) for name, process in self.processes(names)]

    def processes(self, names: Iterable[str]) -> list[tuple[str, Process]]:
        """The same, with the processes."""
        wanted = set(names)
        known = [
            (each.holder, each.process)
            for each in self.on_record()
            if each.holder in wanted and each.process.lives()
        ]
        rest = wanted - {name for name, _ in known}
        return known + find_vmms((self.run / name).resolve() for name in rest) if rest else known

    def on_record(self, name: str = "") -> list[Entry]:
        """The VMMs of this store that were started, and some that have ended; or one guest's."""
        return (
            vmm_registry.of_holder(self.run.name, name)
            if name
            else vmm_registry.of_store(self.run.name)
        )

    def unloaded(self, segment: str) -> set[str]:
        """The guests that have a segment (digest of its manifest) but have unloaded it."""
        return {
            record.name
            for record in self.guests()
            for item in record.attached
            if item.digest == segment and item.state == "detached"
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
            try:
                if mark.exists():
                    # Whatever was interrupted, and wherever: none of them is left.
                    self._end_all(mark)
            finally:
                mark.unlink(missing_ok=True)
                os.close(fd)

    def _end_all(self, mark: Path) -> None:
        """End what belongs to a batch that was not handed out, or to an owner."""
        theirs = [
            folder for path in self.folders() if (folder := RunDirectory(path)).belongs_to(mark)
        ]
        if theirs:
            self.drop(*theirs)
            self.store.sweep()

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
    ) -> Iterator[tuple[RunDirectory, Lease]]:
        """A new guest's run folder and lease; raise AlreadyExists if the name is taken.

        Our copy of the lease is closed at the end. If that is an error nothing is left behind.
        """
        with contextlib.ExitStack() as stack:
            with self.locked():
                if not self.folders():
                    cross_check.note(self.memory_before)
                lease = stack.enter_context(self.store.hold(digests, name, {}))
                folder = batch.add(self.run / name)
            try:
                yield folder, lease
            except BaseException:
                self.drop(folder)
                raise

    def prepared(self) -> list[GuestRecord]:
        """What waits to become guests (guest/lifecycle/pool.py), by name."""
        found = (
            RunDirectory(path).prepared()
            for path in self.folders()
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
    ) -> Iterator[tuple[RunDirectory, GuestRecord] | None]:
        """What was prepared from ``digest``, and suits, in the run folder of a new guest, or None.

        If that ends in an error nothing is left behind.
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
    ) -> tuple[RunDirectory, GuestRecord] | None:
        if not record or self.store.is_held(name):
            return None
        # Killed after this, we leave it to the next command, by whatever name it goes then.
        batch.join(self.run / record.name)
        self.store.rename_holder(record.name, name)
        RunDirectory(self.run / name).remove()
        (self.run / record.name).rename(self.run / name)
        return RunDirectory(self.run / name, batch), record

    def end(self, *records: GuestRecord) -> None:
        """End the VMMs of guests, unasked; remove their folders, and leases that nobody holds.

        What is to be known of those that have ended by themselves is kept.
        """
        with self.ending(*records):
            # Not by their command lines: these are their own memory, which they may change.
            vmm_registry.end(each.process for each in records)
            gone = {each.process for each in records if not each.process.lives()}
            with self.locked():
                deaths, theirs = ended_guests.Deaths(), self._folders_of(records)
                for folder in theirs:
                    preserve(self, deaths, folder)
                self.remove(*theirs)
        for entry in vmm_registry.entries() if gone else ():
            if entry.process in gone:
                RunDirectory(self.run.parent / entry.store / entry.holder).remove()
                entry.forget()
        self.store.sweep()

    def _folders_of(self, records: Iterable[GuestRecord]) -> list[RunDirectory]:
        """The folders of these guests: another one may have the name of one by now."""
        found = [(RunDirectory(self.run / each.name), each) for each in records]
        return [folder for folder, record in found if folder.is_of(record)]

    def ending(self, *records: GuestRecord) -> AbstractContextManager[None]:
        """Guests that run, and end meanwhile, do so because they are told to."""
        return self._ending(self._folders_of(each for each in records if each.process.lives()))

    @contextlib.contextmanager
    def _ending(self, folders: Iterable[RunDirectory]) -> Iterator[None]:
        with self.locked():
            mark, fd = lock_mark(self.run, "ending")
        try:
            for folder in folders:
                with contextlib.suppress(FileNotFoundError):
                    folder.ends_by(mark)
            yield
        finally:
            mark.unlink(missing_ok=True)
            os.close(fd)

    def sweep(self) -> None:
        """Remove what no living command or VMM owns: folders, and guests never handed out."""
        sweep(self)
        for path in self.folders():
            self.keep_logging(RunDirectory(path))
        cgroup.sweep()
        name_servers.refresh(self.run)

    def keep_logging(self, folder: RunDirectory) -> None:
        """Let the logs of a guest go on, without what is oldest, if they are full."""
        if logs.are_filling(folder.path):
            with self.locked(), contextlib.suppress(NotFound, OSError):
                logs.make_room(folder.path, folder.record().pid)

    def drop(self, *folders: RunDirectory) -> None:
        """Remove run folders of the caller's; what is left of their VMMs is ended first."""
        theirs = [each for folder in folders for each in self.on_record(folder.name)]
        with self._ending(folders):
            vmm_registry.end(each.process for each in theirs)
            with self.locked():
                self.remove(*folders)

    def remove(self, *folders: RunDirectory) -> None:
        """Remove run folders, and with the last what was noted at the first start; under lock."""
        for folder in folders:
            folder.remove()
        for entry in [each for folder in folders for each in self.on_record(folder.name)]:
            # Only now may its user number be given out again.
            if not entry.process.lives():
                entry.forget()
        if not self.folders():
            self.memory_before.unlink(missing_ok=True)
            name_servers.forget(self.run)

    @property
    def memory_before(self) -> Path:
        """Where the host's memory is noted when the first guest starts (sharing/cross_check.py)."""
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
            # What another version of onecopy has written is told by `lost`.
            with contextlib.suppress(NotFound, Incompatible):
                records.append(RunDirectory(path).record())
        return sorted(records, key=lambda record: in_order(record.name))

    def folders(self) -> list[Path]:
        """The run folders that there are."""
        found = (path for path in self.run.iterdir() if not path.name.startswith("."))
        return [path for path in found if path.is_dir() and not path.is_symlink()]

    @contextlib.contextmanager
    def locked(self) -> Iterator[int]:
        """Between claiming a name and having its folder nobody may sweep.

        The lock's file, whose descriptor this yields, has the number of the next guest. Nothing
        waits for another process under it.
        """
        while True:
            with contextlib.ExitStack() as ends:
                try:
                    fd = ends.enter_context(alone(self.run / ".lock"))
                except FileNotFoundError:
                    self.make_run()
                    continue
                yield fd
                return

    def make_run(self) -> None:
        """Make the folder of all run folders, which somebody may have removed."""
        if not self.run.parent.exists():
            make_run_base()
        make_own(self.run)
        note, root = self.run / vmm_registry.STORE, os.fsencode(self.store.root)
        if not note.exists() or note.read_bytes() != root:
            files.replace(note, root)
