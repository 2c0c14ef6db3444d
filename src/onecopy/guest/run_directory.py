"""Run directories: the files of a running guest on the host, and its record.

    RUN/NAME/
        guest.json      the guest's record; written once the guest is ready
        prepared.json   the record of a standby VMM (guest/lifecycle/pool.py)
        system.json     the record that a save of the guest would have (machine.py)
        starting        link to the mark of the command that starts it; dangling afterwards
        owner           link to the mark of the process that it ends with, if any
        ending          link to the mark of the command that ends it; dangling afterwards
        monitor.sock    QMP; the command that uses it holds monitor.lock
        agent.in .out   pipes to the guest agent, with agent.lock
        identity.in .out  pipes to the guest's identity program
        segment.in .out   pipes to the guest's onecopy-segment
        attach.lock     locked by a command that changes the guest's segments
        paused          locked by a command that has the guest paused
        exec.TAG        locked by a command that runs a program in the guest
        console.sock    the serial console; console.log has its newest output
        qemu.log        QEMU's own output
        console.cut     exists if console.log was truncated (vmm/logs.py); likewise qemu.cut

    QEMU's user owns the files that QEMU opens itself (pipes, console.log). The invoking user owns
    the directory and all other files: QEMU can neither make nor replace files (vmm/confine.py).

    RUN/.starting-ID    locked by a command that starts guests; removed when they are ready
    RUN/.owner-ID       locked by a process as long as it needs its guests (Runtime.owner)
    RUN/.ending-ID      locked by a command that ends guests, until they are gone
    RUN/.ended          records of guests that ended on their own (ended_guests.py)

    RUN/.store          the path of the store

A guest exists as long as its VMM lives. The VMM holds its lease in the store (store/lease.py) and
is registered (linux/vmm_registry.py). The next command sweeps directories without a live lease,
and VMMs whose mark nobody locks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable
from pathlib import Path

import msgspec

from onecopy.errors import AgentFailed, Incompatible, NotFound, OnecopyError
from onecopy.guest.end import Ended
from onecopy.linux import files, process
from onecopy.linux.files import process_directory
from onecopy.linux.lock import is_held, is_left
from onecopy.linux.removal import remove_tree
from onecopy.linux.run_base import run_base
from onecopy.linux.vmm_registry import Process, store_id
from onecopy.model import PageClass
from onecopy.store import Store

MARK_PREFIXES = {kind: f".{kind}-" for kind in ("starting", "owner", "ending")}
#: Prefix of the run directories of standby VMMs. A guest's name has no dot.
POOL = "pool."


class Device(msgspec.Struct, frozen=True):
    """A range of a segment, as a device of a guest."""

    page_class: PageClass
    size: int
    """Bytes."""
    fs: str
    address: str
    """PCI bus and slot in hexadecimal: ``00:10``."""
    path: str
    """The mapped file, as in the VMM's /proc/PID/maps."""
    file: str
    """The file of the store whose pages the range shares until it is written; "" for none."""


class Attached(msgspec.Struct, frozen=True):
    """A segment in a guest; its lease lasts until the guest ends, even after an unload."""

    name: str
    ref: str
    """``NAME:VERSION`` when it was loaded."""
    digest: str
    """Digest of its manifest."""
    devices: tuple[Device, ...]
    mountpoint: str
    """Mount point; "" for a segment that is not mounted."""
    state: str
    """``loading``; ``loaded``; ``detached``: unloaded, but QEMU could not remove its devices."""
    exclusive: bool = False
    """Whether it is the guest's own writable copy of a shared segment."""


class GuestDisk(msgspec.Struct, frozen=True):
    """A persistent disk of a guest."""

    name: str
    """/dev/onecopy/NAME in the guest."""
    path: str
    """The image on the host."""
    format: str
    """``raw`` or ``qcow2``."""
    owned: bool
    """Whether the disk belongs to the guest's name, and its next guest gets it again."""
    mountpoint: str
    """Mount point; "" for a disk that is not mounted."""
    address: str
    """PCI bus and slot in hexadecimal: ``01:05``."""
    created: bool = False
    """Whether it was created at this guest's start."""


#: The value of `GuestRecord.why_exec` if the user asked for exec.
REQUESTED = "requested"


class GuestRecord(msgspec.Struct, frozen=True):
    """guest.json: the record of a running guest."""

    name: str
    kind: str
    """``clone`` (started from a saved system) or ``booted``."""
    source: str
    """Reference of the saved system or root segment."""
    digest: str
    """Digest of its manifest."""
    accel: str
    accel_reason: str
    pid: int
    start_ticks: int
    """Start time of QEMU in clock ticks since the host's boot; identifies the process with pid."""
    started: float
    """Start time in seconds since 1970."""
    start_seconds: float
    """Seconds from the start of QEMU until the guest was ready."""
    memory: int
    """Bytes of RAM."""
    ram_path: str | None
    """The file that RAM is mapped from; None for anonymous RAM."""
    publish: tuple[tuple[int, int], ...] = ()
    """Pairs (port on 127.0.0.1, port of the guest)."""
    attached: tuple[Attached, ...] = ()
    """The segments that it has now."""
    domain: str = ""
    """Its trust domain; "" is the default one."""
    mac: str = ""
    """MAC address; "" without a network card."""
    address: str = ""
    """IP address when the guest became ready, in its user-mode network or in the bridge's."""
    bridge: str = ""
    """The host's bridge; "" for a user-mode network."""
    allow_host: bool = False
    """Whether it reaches the host's listening ports (vmm/closed_network.py)."""
    listener: int | None = None
    """QEMU's descriptor for opening files later (vmm/open_notify.py); None if not needed."""
    agent: bool = True
    """Whether it has an agent; a bare machine has none."""
    cpus: int = 1
    """Number of vCPUs."""
    added: int = 0
    """Bytes of ``memory`` that were added to the saved system's RAM."""
    disks: tuple[GuestDisk, ...] = ()
    """Persistent disks."""
    traced: bool = False
    """Whether its QEMU logs how it ends (vmm/end_traces.py)."""
    forked: bool | None = None
    """Whether a fork server started its QEMU (vmm/fork_server.py); None if unknown."""
    why_exec: str = ""
    """Why no fork server did: ``requested``, or why it could not."""
    ended: Ended | None = None
    """How it ended on its own (ended_guests.py); None for a running guest."""
    note: str = ""
    """Damage of a running guest (lost_vmms.py); "" for none, and always "" in the file."""
    schema: int = 4

    @property
    def process(self) -> Process:
        """The VMM's process."""
        return Process(self.pid, self.start_ticks)


def no_guest(name: str) -> NotFound:
    """Return the error for a name that no guest has."""
    return NotFound(
        f"there is no guest {name!r}", hint="list the guests with `onecopy ps`", guest=name
    )


def no_agent(name: str) -> AgentFailed:
    """Return the error for a request that needs an agent, to a bare machine."""
    return AgentFailed(
        f"{name} is a bare machine and has no agent",
        hint="commands without an agent are ps, report, logs, console and stop",
    )


def run_root(store: Store) -> Path:
    """Return the directory of the run directories of a store's guests."""
    # Short, because socket paths have at most 108 bytes (unix(7)), and unique to the store.
    return run_base() / store_id(store.root)


class RunDirectory:
    """The run directory of a guest."""

    def __init__(self, path: Path, batch: Batch | None = None) -> None:
        self.path = path
        self.name = path.name
        self._batch = batch

    def record(self) -> GuestRecord:
        """Read guest.json.

        Raises:
            NotFound: There is no such guest, or it is not ready and another command starts it.
            Incompatible: Another version of onecopy wrote the record.
        """
        try:
            text = (self.path / "guest.json").read_bytes()
        except FileNotFoundError:
            text = b""
        if not text or (self._mark.exists() and not self._ours):
            raise no_guest(self.name)
        try:
            return msgspec.json.decode(text, type=GuestRecord)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise Incompatible(
                f"cannot decode {self.path}/guest.json: another version of onecopy started "
                f"{self.name}",
                hint=f"stop it with that version, or end its QEMU: kill {self.find_vmm() or 'PID'}",
            ) from error

    def require_agent(self) -> GuestRecord:
        """Return the record; raise AgentFailed for a bare machine."""
        record = self.record()
        if not record.agent:
            raise no_agent(self.name)
        return record

    def write(self, record: GuestRecord) -> None:
        """Write the record of a guest that is up."""
        self._write("guest.json", record)

    def set_aside(self, record: GuestRecord) -> None:
        """Write the record of a standby VMM."""
        self._write("prepared.json", record)

    def prepared(self) -> GuestRecord | None:
        """Return the record of a standby VMM; None without one, or of another version."""
        with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError, RecursionError):
            text = (self.path / "prepared.json").read_bytes()
            return msgspec.json.decode(text, type=GuestRecord)
        return None

    def is_of(self, record: GuestRecord) -> bool:
        """Return whether the directory is that guest's, and not a later guest's of its name."""
        for name in ("guest.json", "prepared.json"):
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                found = msgspec.json.decode((self.path / name).read_bytes(), type=Process)
                return found == record.process
        return False

    @property
    def is_starting(self) -> bool:
        """Whether a living command is starting the guest."""
        mark = _target(self._mark)
        return mark is not None and is_held(mark)

    def belongs_to(self, mark: Path) -> bool:
        """Return whether the guest belongs to the batch or owner with that mark."""
        return mark in (_target(self._mark), self.owner)

    def _write(self, name: str, record: GuestRecord) -> None:
        files.replace(self.path / name, msgspec.json.encode(record))

    @property
    def abandoned(self) -> bool:
        """Whether the command that was starting the guest, or its owner, is gone."""
        mark = _target(self._mark)
        if mark and is_left(mark):
            return True
        owner = self.owner
        # Read the owner again: `keep` may have detached the guest before its owner ended.
        return owner is not None and not is_held(owner) and self.owner is not None

    @property
    def owner(self) -> Path | None:
        """The mark of the process that the guest ends with; None for none."""
        return _target(self.path / "owner")

    def ends_by(self, mark: Path) -> None:
        """Record that the command with this mark is ending the guest."""
        (self.path / "ending").unlink(missing_ok=True)
        (self.path / "ending").symlink_to(mark)

    @property
    def is_being_ended(self) -> bool:
        """Whether a living command is ending the guest, so that it does not end on its own."""
        mark = _target(self.path / "ending")
        return mark is not None and is_held(mark)

    def keep(self) -> None:
        """Detach the guest from its owner, so that it outlives that process."""
        (self.path / "owner").unlink(missing_ok=True)

    @property
    def left_paused(self) -> bool:
        """Whether a command that paused the guest (pause.py) was killed."""
        return is_left(self.path / "paused")

    @property
    def _ours(self) -> bool:
        return self._batch is not None and _target(self._mark) == self._batch.mark

    @property
    def _mark(self) -> Path:
        return self.path / "starting"

    def remove(self) -> None:
        """Remove the directory; its VMM must have ended."""
        remove_tree(self.path)

    def find_vmm(self) -> int | None:
        """Return the pid of the VMM; None if there is none."""
        found = find_vmms([self.path])
        return found[0][1].pid if found else None


def _target(link: Path) -> Path | None:
    """Return the target of a link; None if the link or its directory is gone."""
    with contextlib.suppress(FileNotFoundError):
        return link.readlink()
    return None


def find_vmms(folders: Iterable[Path]) -> list[tuple[str, Process]]:
    """Return (guest, process) of unregistered VMMs of these run directories (vmm_registry.py).

    Their command was killed right after it started them; a VMM that runs guest code is registered.
    Such a VMM has a guest's command line and works in a run directory, which no other user can
    enter. It may have been started under another name (guest/lifecycle/pool.py).
    """
    wanted, found = set(folders), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            pid = int(entry.name)
            # Skip a process that cannot be read or has ended.
            with contextlib.suppress(OnecopyError, OSError):
                began = process.stat(pid).start_ticks
                if folder := _guest_of(pid, wanted):
                    found.append((folder.name, Process(pid, began)))
    return found


def _guest_of(pid: int, wanted: Container[Path]) -> Path | None:
    folder = (process_directory(pid) / "cwd").readlink()
    if folder in wanted and "\0-name\0guest=" in "\0".join(process.cmdline(pid)):
        return folder
    return None


class Batch(msgspec.Struct, frozen=True):
    """Guests that one command starts: all become ready together, or none does.

    Created under the host's lock, so that no sweep sees it without its lock.
    """

    mark: Path
    owner: Path | None = None
    """The mark of the process that they end with; None for none."""

    def add(self, path: Path) -> RunDirectory:
        """Make a run directory for a guest; on failure the caller ends its VMM and removes it."""
        if path.exists():  # its lease is free, so this is a leftover
            remove_tree(path)
        path.mkdir()
        # The VMM may be another user, who must reach the files made for it and list nothing.
        path.chmod(0o711)
        return self.join(path)

    def join(self, path: Path) -> RunDirectory:
        """Make an existing run directory part of the batch."""
        for kind, mark in (("owner", self.owner), ("starting", self.mark)):
            (path / kind).unlink(missing_ok=True)
            if mark:
                (path / kind).symlink_to(mark)
        return RunDirectory(path, self)

    def hand_out(self) -> None:
        """Publish the guests: they are ready, and outlive the command unless they have an owner."""
        self.mark.unlink()


def is_mark(path: Path) -> bool:
    """Return whether ``path``, beside the run directories, is a mark."""
    return path.name.startswith(tuple(MARK_PREFIXES.values()))
