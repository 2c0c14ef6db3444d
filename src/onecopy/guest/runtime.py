"""A store with its guests: finds, claims, ends and sweeps their run directories."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from onecopy.errors import Incompatible, NotFound
from onecopy.guest import ended_guests
from onecopy.guest.run_directory import (
    MARK_PREFIXES,
    POOL,
    Batch,
    GuestRecord,
    RunDirectory,
    find_vmms,
    run_root,
)
from onecopy.guest.sweep import preserve, sweep
from onecopy.linux import cgroup, files, vmm_registry
from onecopy.linux.lock import locked_blocking
from onecopy.linux.run_base import make_own, make_run_base
from onecopy.linux.vmm_registry import Entry, Process
from onecopy.model import in_order
from onecopy.store import Lease, Store
from onecopy.vmm import fork_registry, logs, name_servers

if TYPE_CHECKING:
    from onecopy.vmm.qemu import Qemu


class Runtime(msgspec.Struct, frozen=True, dict=True):
    """A store and the guests that run from it."""

    store: Store
    run: Path
    batch_seen: Batch | None = None
    """A batch whose guests are visible before they are ready."""

    @classmethod
    def open(cls, root: Path | None = None) -> Runtime:
        """Open the store (default: store.default_root()) and sweep the leftovers of commands."""
        make_run_base()
        store = Store(root)
        host = cls(store, run_root(store))
        host.make_run()
        host.sweep()
        return host

    @cached_property
    def qemu(self) -> Qemu:
        """This host's QEMU."""
        from onecopy.vmm.qemu import probe  # few commands need QEMU

        return probe(self.store.cache)

    def guest(self, name: str) -> RunDirectory:
        """Return the run directory of a running guest.

        Raises:
            NotFound: There is no such guest; the message has the reason if it has ended.
        """
        folder = RunDirectory(self.run / name, self.batch_seen)
        with self._explain_end(name):
            folder.record()
        return folder

    def guest_with_agent(self, name: str) -> RunDirectory:
        """Return the run directory of a running guest with an agent.

        Raises:
            NotFound: There is no such guest.
            AgentFailed: It is a bare machine.
        """
        folder = RunDirectory(self.run / name, self.batch_seen)
        with self._explain_end(name):
            folder.require_agent()
        return folder

    @contextlib.contextmanager
    def _explain_end(self, name: str) -> Iterator[None]:
        """Replace NotFound by the reason of the guest's end, if there is a record of it."""
        try:
            yield
        except NotFound:
            if record := ended_guests.find(self.run, name):
                raise ended_guests.no_more(record) from None
            raise

    def ended(self) -> list[GuestRecord]:
        """Return the records of guests that ended on their own, by name."""
        return ended_guests.records(self.run)

    def forget(self, *names: str) -> None:
        """Remove the records of guests that ended on their own."""
        with self.locked():
            ended_guests.forget(self.run, *names)

    def seeing(self, batch: Batch) -> Runtime:
        """Return a runtime that sees the guests of ``batch`` before they are ready."""
        return msgspec.structs.replace(self, batch_seen=batch)

    def guests(self) -> list[GuestRecord]:
        """Return the records of all ready guests whose VMM lives, by name."""
        return self._records(self.folders())

    def owned(self, owner: Path) -> list[GuestRecord]:
        """Return the records of the guests that end with an owner."""
        return self._records(path for path in self.folders() if RunDirectory(path).owner == owner)

    def vmms(self, names: Iterable[str]) -> list[tuple[str, int]]:
        """Return (guest, pid of its VMM) for those of ``names`` that run or are being started."""
        return [(name, process.pid) for name, process in self.processes(names)]

    def processes(self, names: Iterable[str]) -> list[tuple[str, Process]]:
        """Return (guest, VMM process) for those of ``names`` that run or are being started."""
        wanted = set(names)
        known = [
            (each.holder, each.process)
            for each in self.on_record()
            if each.holder in wanted and each.process.lives()
        ]
        rest = wanted - {name for name, _ in known}
        return known + find_vmms((self.run / name).resolve() for name in rest) if rest else known

    def on_record(self, name: str = "") -> list[Entry]:
        """Return the registered VMMs of this store, or of one guest; some may have ended."""
        return (
            vmm_registry.of_holder(self.run.name, name)
            if name
            else vmm_registry.of_store(self.run.name)
        )

    def unloaded(self, segment: str) -> set[str]:
        """Return the guests that still hold a segment (manifest digest) that they unloaded."""
        return {
            record.name
            for record in self.guests()
            for item in record.attached
            if item.digest == segment and item.state == "detached"
        }

    @contextlib.contextmanager
    def batch(self, owner: Path | None = None) -> Iterator[Batch]:
        """Yield a batch for guests to start; the caller publishes it when they are ready.

        At the end, guests of an unpublished batch are ended. If this process is killed, the next
        command ends them, and later those of an ``owner`` that has ended.
        """
        with self._marked("starting") as mark:
            yield Batch(mark, owner)

    def owner(self) -> contextlib.AbstractContextManager[Path]:
        """Yield the mark of an owner: its guests end with the block.

        If this process is killed, the next command ends them.
        """
        return self._marked("owner")

    @contextlib.contextmanager
    def _marked(self, kind: str) -> Iterator[Path]:
        with self._mark(kind) as mark:
            try:
                yield mark
            finally:
                if mark.exists():
                    # The batch was not published. Leave no guest, wherever the error came from.
                    self._end_all(mark)

    @contextlib.contextmanager
    def _mark(self, kind: str) -> Iterator[Path]:
        """Yield a mark, locked until the end; ``kind`` is one of MARK_PREFIXES."""
        mark = self.run / f"{MARK_PREFIXES[kind]}{os.urandom(8).hex()}"
        with contextlib.ExitStack() as stack:
            with self.locked():
                stack.enter_context(locked_blocking(mark))
            stack.callback(mark.unlink, missing_ok=True)
            yield mark

    def _end_all(self, mark: Path) -> None:
        """End the guests of an unpublished batch or of an owner."""
        theirs = [
            folder for path in self.folders() if (folder := RunDirectory(path)).belongs_to(mark)
        ]
        if theirs:
            self.drop(*theirs)
            self.store.sweep()

    @contextlib.contextmanager
    def starting(self) -> Iterator[Batch]:
        """Yield a batch for one guest, which is published at the end."""
        with self.batch() as own:
            yield own
            own.hand_out()

    @contextlib.contextmanager
    def claim(
        self, name: str, digests: Sequence[str], batch: Batch
    ) -> Iterator[tuple[RunDirectory, Lease]]:
        """Claim a name for a new guest; yield its run directory and lease.

        The lease's descriptor is closed at the end. After an error nothing is left.

        Raises:
            AlreadyExists: The name is taken.
        """
        with contextlib.ExitStack() as stack:
            with self.locked():
                if not self.folders():
                    from onecopy.sharing import cross_check  # few guests are the first

                    cross_check.note(self.memory_before, fork_registry.pids())
                lease = stack.enter_context(self.store.hold(digests, name, {}))
                folder = batch.add(self.run / name)
            try:
                yield folder, lease
            except BaseException:
                self.drop(folder)
                raise

    def prepared(self) -> list[GuestRecord]:
        """Return the records of the standby VMMs (guest/lifecycle/pool.py), by name."""
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
        """Take a standby VMM for a new guest; after an error nothing is left.

        Args:
            digest: Manifest digest of its saved system.
            name: The guest's name.
            batch: The guest's batch.
            suits: Selects the VMM by its record.

        Yields:
            The run directory, moved to the guest's name, and the VMM's record; None if no VMM
            suits or the name is taken.
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
        # From here on the next command ends the VMM if this one is killed, under either name.
        batch.join(self.run / record.name)
        self.store.rename_holder(record.name, name)
        RunDirectory(self.run / name).remove()
        (self.run / record.name).rename(self.run / name)
        return RunDirectory(self.run / name, batch), record

    def end(self, *records: GuestRecord) -> None:
        """Kill the VMMs of guests; remove their run directories and stale leases.

        The records of guests that had ended on their own are kept.
        """
        with self.ending(*records):
            # By pid and start time. A VMM can change its command line, which is in its memory.
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
        """Return the run directories that still belong to these guests, not to later ones."""
        found = [(RunDirectory(self.run / each.name), each) for each in records]
        return [folder for folder, record in found if folder.is_of(record)]

    def ending(self, *records: GuestRecord) -> contextlib.AbstractContextManager[None]:
        """Mark running guests: an end within the block is not an end on their own."""
        return self._ending(self._folders_of(each for each in records if each.process.lives()))

    @contextlib.contextmanager
    def _ending(self, folders: Iterable[RunDirectory]) -> Iterator[None]:
        with self._mark("ending") as mark:
            for folder in folders:
                with contextlib.suppress(FileNotFoundError):
                    folder.ends_by(mark)
            yield

    def sweep(self) -> None:
        """Remove run directories and guests that no living command or VMM owns."""
        sweep(self)
        for path in self.folders():
            self.keep_logging(RunDirectory(path))
        cgroup.sweep()
        name_servers.refresh(self.run)

    def keep_logging(self, folder: RunDirectory) -> None:
        """Truncate the logs of a guest at their start if they are almost full."""
        if logs.are_filling(folder.path):
            from onecopy.vmm import log_room  # a log rarely fills

            with self.locked(), contextlib.suppress(NotFound, OSError):
                log_room.make_room(folder.path, folder.record().pid)

    def drop(self, *folders: RunDirectory) -> None:
        """Kill the VMMs of run directories that the caller owns, and remove the directories."""
        theirs = [each for folder in folders for each in self.on_record(folder.name)]
        with self._ending(folders):
            vmm_registry.end(each.process for each in theirs)
            with self.locked():
                self.remove(*folders)

    def remove(self, *folders: RunDirectory) -> None:
        """Remove run directories, and with the last one the host's notes; requires the lock."""
        for folder in folders:
            folder.remove()
        for entry in [each for folder in folders for each in self.on_record(folder.name)]:
            # This frees the VMM's user ID, so its files must be gone.
            if not entry.process.lives():
                entry.forget()
        if not self.folders():
            self.memory_before.unlink(missing_ok=True)
            name_servers.forget(self.run)

    @property
    def memory_before(self) -> Path:
        """The record of the host's memory before the first guest (sharing/cross_check.py)."""
        return self.run / ".before"

    def next_number(self) -> int:
        """Return the next number of a sequence that starts at the host's boot."""
        with self.locked() as lock:
            number = int(os.pread(lock, 20, 0) or b"0")
            os.pwrite(lock, str(number + 1).encode(), 0)
        return number

    def _records(self, folders: Iterable[Path]) -> list[GuestRecord]:
        records = []
        for path in folders:
            # `lost_vmms.lost` reports records of other versions.
            with contextlib.suppress(NotFound, Incompatible):
                records.append(RunDirectory(path).record())
        return sorted(records, key=lambda record: in_order(record.name))

    def folders(self) -> list[Path]:
        """Return all run directories."""
        found = (path for path in self.run.iterdir() if not path.name.startswith("."))
        return [path for path in found if path.is_dir() and not path.is_symlink()]

    @contextlib.contextmanager
    def locked(self) -> Iterator[int]:
        """Hold the host's lock, which keeps sweeps from a name that is being claimed.

        Yields the descriptor of the lock file, which contains the next guest's number. No code
        waits for another process while it holds this lock.
        """
        while True:
            with contextlib.ExitStack() as ends:
                try:
                    fd = ends.enter_context(locked_blocking(self.run / ".lock"))
                except FileNotFoundError:
                    self.make_run()
                    continue
                yield fd
                return

    def make_run(self) -> None:
        """Make the directory of the run directories if it is missing."""
        if not self.run.parent.exists():
            make_run_base()
        make_own(self.run)
        note, root = self.run / vmm_registry.STORE, os.fsencode(self.store.root)
        if not note.exists() or note.read_bytes() != root:
            files.replace(note, root)
