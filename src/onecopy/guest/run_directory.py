"""Run folders: what a running guest has on the host, and how a dead one is swept.

    RUN/NAME/
        guest.json      what it is; written once the guest is up
        prepared.json   the same, of a VMM that waits to become a guest (guest/lifecycle/pool.py)
        system.json     what a saved system's record says of it (machine.py)
        starting        link to the mark of the command that starts it; leads nowhere afterwards
        owner           link to the mark of the process that it ends with; only if it does
        ending          link to the mark of the command that ends it; leads nowhere afterwards
        monitor.sock    QMP; monitor.lock is held by the command that speaks it
        agent.in .out   pipes to the guest agent, agent.lock beside them
        identity.in .out  pipes to the guest's identity program
        segment.in .out   pipes to the guest's onecopy-segment
        attach.lock     held by the command that changes which segments the guest has
        paused          locked by the command that lets the guest stand still
        exec.TAG        locked by the command that runs a program in the guest
        console.sock    the serial console; console.log keeps the newest that it said
        qemu.log        what QEMU itself said
        console.cut     there if some of console.log was dropped (vmm/logs.py); qemu.cut alike

    What QEMU opens there by itself (pipes, console.log) is its user's; the folder and all else is
    ours, so that QEMU makes and replaces nothing (vmm/confine.py).

    RUN/.starting-ID    locked by a command that starts guests; gone when they are handed out
    RUN/.owner-ID       locked by a process as long as it wants its guests (Host.owner)
    RUN/.ending-ID      locked by a command that ends guests, until they are gone
    RUN/.ended          what is left of guests that ended by themselves (ended_guests.py)

    RUN/.store          the path of the store

A guest exists as long as its VMM lives, which holds its lease in the store (store/lease.py) and is
on record (linux/vmm_registry.py). A folder without a live lease is a leftover; so is a VMM whose
mark nobody locks any more: both are swept by the next command.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Container, Iterable
from pathlib import Path

import msgspec

from onecopy.errors import AgentFailed, Incompatible, NotFound, OnecopyError
from onecopy.guest.end_reason import Ended
from onecopy.linux import files, process
from onecopy.linux.files import process_folder
from onecopy.linux.lock import is_held, is_left
from onecopy.linux.removal import remove_tree
from onecopy.linux.run_base import run_base
from onecopy.linux.vmm_registry import Process, store_id
from onecopy.model import PageClass
from onecopy.store import Store

_MARKS = ("starting", "owner", "ending")
#: How the run folders of VMMs begin that wait to become guests: no guest's name has a dot.
POOL = "pool."


class Device(msgspec.Struct, frozen=True):
    """One range of a segment, as a guest has it."""

    page_class: PageClass
    size: int
    """Bytes."""
    fs: str
    address: str
    """Bus and slot on PCI, in hexadecimal: ``00:10``."""
    path: str
    """What the VMM maps, as /proc/PID/maps has it."""
    file: str
    """The file of the store whose pages these are, at least until written to; "" if none."""


class Attached(msgspec.Struct, frozen=True):
    """A segment in a guest. Its lease is kept until the guest ends, also when it is unloaded."""

    name: str
    ref: str
    """``NAME:VERSION``, at the time."""
    digest: str
    """Its manifest."""
    devices: tuple[Device, ...]
    mountpoint: str
    """"" if it is not mounted."""
    state: str
    """``loaded``; ``loading``; or ``detached``: unloaded, but QEMU cannot take its device away."""
    exclusive: bool = False
    """Loaded as a copy of the guest's own, to write to, of what others only read."""


class GuestDisk(msgspec.Struct, frozen=True):
    """A disk of a guest, whose content stays when it ends."""

    name: str
    """/dev/onecopy/NAME in the guest."""
    path: str
    """The image on the host."""
    format: str
    """``raw`` or ``qcow2``."""
    owned: bool
    """Whether it is the guest's own, found again by the guest's name."""
    mountpoint: str
    """"" if it is not mounted."""
    address: str
    """Bus and slot on PCI, in hexadecimal: ``01:05``."""
    created: bool = False
    """Whether it was created for this guest, at its start."""


class GuestRecord(msgspec.Struct, frozen=True):
    """guest.json: one running guest."""

    name: str
    kind: str
    """``clone`` (started from a saved system) or ``cold`` (booted)."""
    source: str
    """Reference of the saved system or root segment."""
    digest: str
    """Its manifest."""
    accel: str
    accel_reason: str
    pid: int
    start_ticks: int
    """Clock ticks from the host's boot to QEMU's start: with the pid, its identity."""
    started: float
    """Seconds since the epoch."""
    start_seconds: float
    """From starting QEMU until the guest was handed out."""
    memory: int
    """Bytes of RAM."""
    ram_path: str | None
    """The file that RAM is mapped from; None for anonymous RAM."""
    publish: tuple[tuple[int, int], ...] = ()
    """(port on 127.0.0.1, port of the guest) pairs."""
    attached: tuple[Attached, ...] = ()
    """The segments that it has now."""
    domain: str = ""
    """Its trust domain; "" is the default one."""
    mac: str = ""
    """Of its network card; "" if it has none."""
    address: str = ""
    """Of IP, when it was handed out: in a network of its own, or in that of the bridge."""
    bridge: str = ""
    """Of the host, that it is a port of; "" for user-mode network."""
    allow_host: bool = False
    """Whether its user-mode network reaches what listens on the host (vmm/closed_network.py)."""
    listener: int | None = None
    """Descriptor of QEMU's where it asks for files (vmm/open_notify.py); None if it needs not."""
    agent: bool = True
    """Whether our agent is in it: not in a bare machine (guest/lifecycle/bootplan.py)."""
    cpus: int = 1
    """Processors."""
    added: int = 0
    """Bytes of ``memory`` that came after the saved system was loaded."""
    disks: tuple[GuestDisk, ...] = ()
    """Whose content stays when it ends."""
    traced: bool = False
    """Whether its QEMU notes in its log how it ends (vmm/end_traces.py)."""
    ended: Ended | None = None
    """How it ended, if it has, by itself (ended_guests.py)."""
    note: str = ""
    """What is wrong with it now (lost_vmms.py); "" as a rule, and always in the file."""
    schema: int = 4

    @property
    def process(self) -> Process:
        """Its VMM."""
        return Process(self.pid, self.start_ticks)


def no_guest(name: str) -> NotFound:
    """The error for a name that no guest has."""
    return NotFound(
        f"there is no guest {name!r}", hint="`onecopy ps` lists the running guests", guest=name
    )


def no_agent(name: str) -> AgentFailed:
    """Why nothing can be done inside a bare machine."""
    return AgentFailed(
        f"{name} is a bare machine: no agent of onecopy is in it",
        hint="without one there are ps, report, logs, console and stop",
    )


def run_root(store: Store) -> Path:
    """The run folders of the guests of a store."""
    # Short, since socket paths must be (unix(7): 108 bytes), and one for each store.
    return run_base() / store_id(store.root)


class RunDirectory:
    """The run folder of one guest."""

    def __init__(self, path: Path, batch: Batch | None = None) -> None:
        self.path = path
        self.name = path.name
        self._batch = batch

    def record(self) -> GuestRecord:
        """Read guest.json; raise NotFound while the guest is not handed out, or Incompatible.

        Who starts it, as one of its ``batch``, sees it before.
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
                f"{self.path}/guest.json cannot be read: another version of onecopy started "
                f"{self.name}",
                hint=f"`onecopy stop` it with that version, or end its QEMU: "
                f"kill {self.find_vmm() or 'PID'}",
            ) from error

    def require_agent(self) -> GuestRecord:
        """The record of a guest that our agent is in; raise AgentFailed of a bare machine."""
        record = self.record()
        if not record.agent:
            raise no_agent(self.name)
        return record

    def write(self, record: GuestRecord) -> None:
        """Note what the guest is, now that it is up."""
        self._write("guest.json", record)

    def set_aside(self, record: GuestRecord) -> None:
        """Note what it will be, when somebody wants a guest."""
        self._write("prepared.json", record)

    def prepared(self) -> GuestRecord | None:
        """What was set aside; None if nothing was, or by another version of onecopy."""
        with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError, RecursionError):
            text = (self.path / "prepared.json").read_bytes()
            return msgspec.json.decode(text, type=GuestRecord)
        return None

    def is_of(self, record: GuestRecord) -> bool:
        """Whether it is the folder of that guest, and not of a later one of the name."""
        for name in ("guest.json", "prepared.json"):
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                found = msgspec.json.decode((self.path / name).read_bytes(), type=Process)
                return found == record.process
        return False

    @property
    def is_starting(self) -> bool:
        """Whether a command that lives is starting it."""
        mark = _target(self._mark)
        return mark is not None and is_held(mark)

    def belongs_to(self, mark: Path) -> bool:
        """Whether it is of the batch or of the owner with that mark."""
        return mark in (_target(self._mark), self.owner)

    def _write(self, name: str, record: GuestRecord) -> None:
        files.replace(self.path / name, msgspec.json.encode(record))

    @property
    def abandoned(self) -> bool:
        """Whether the command that was starting it, or the process that it ends with, is gone."""
        mark = _target(self._mark)
        if mark and is_left(mark):
            return True
        owner = self.owner
        # Looked at once more: it may have been kept (`keep`) before its owner let go.
        return owner is not None and not is_held(owner) and self.owner is not None

    @property
    def owner(self) -> Path | None:
        """The mark of the process that it ends with, if it does."""
        return _target(self.path / "owner")

    def ends_by(self, mark: Path) -> None:
        """Its VMM is about to be ended, or has been asked to end, by the command with this mark."""
        (self.path / "ending").unlink(missing_ok=True)
        (self.path / "ending").symlink_to(mark)

    @property
    def is_being_ended(self) -> bool:
        """Whether a command is ending it: it does not end by itself, then."""
        mark = _target(self.path / "ending")
        return mark is not None and is_held(mark)

    def keep(self) -> None:
        """From now on it does not end with the process that started it."""
        (self.path / "owner").unlink(missing_ok=True)

    @property
    def left_paused(self) -> bool:
        """Whether the command that let it stand still (pause.py) is gone."""
        return is_left(self.path / "paused")

    @property
    def _ours(self) -> bool:
        return self._batch is not None and _target(self._mark) == self._batch.mark

    @property
    def _mark(self) -> Path:
        return self.path / "starting"

    def remove(self) -> None:
        """Remove the folder; its VMM must be gone."""
        remove_tree(self.path)

    def find_vmm(self) -> int | None:
        """Process id of the VMM; None if there is none."""
        found = find_vmms([self.path])
        return found[0][1].pid if found else None


def _target(link: Path) -> Path | None:
    """Where a link leads; None if there is none, or none any more: folders go at any time."""
    with contextlib.suppress(FileNotFoundError):
        return link.readlink()
    return None


def find_vmms(folders: Iterable[Path]) -> list[tuple[str, Process]]:
    """(guest, process) of VMMs of these run folders that are not on record (linux/vmm_registry.py).

    Their command was killed right after it had started them, and a VMM that runs guest code is on
    record. It is the process that was started as a guest and works in its folder, which nobody else
    can enter. It may have been started under another name (guest/lifecycle/pool.py).
    """
    wanted, found = set(folders), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            pid = int(entry.name)
            # What cannot be read of it, or ends meanwhile, is none.
            with contextlib.suppress(OnecopyError, OSError):
                began = process.stat(pid).start_ticks
                if folder := _guest_of(pid, wanted):
                    found.append((folder.name, Process(pid, began)))
    return found


def _guest_of(pid: int, wanted: Container[Path]) -> Path | None:
    folder = (process_folder(pid) / "cwd").readlink()
    if folder in wanted and "\0-name\0guest=" in "\0".join(process.cmdline(pid)):
        return folder
    return None


class Batch(msgspec.Struct, frozen=True):
    """Guests that one command starts: they become the user's all at once, or none of them does.

    Made while no sweeper runs.
    """

    mark: Path
    owner: Path | None = None
    """The mark of the process that they end with, if they do."""

    def add(self, path: Path) -> RunDirectory:
        """A new run folder for one of them; the caller ends its VMM and removes it if it fails."""
        if path.exists():  # its lease was free: what is here is a leftover
            remove_tree(path)
        path.mkdir()
        # Its VMM may be another user, who has no more than the way to what is made for it there.
        path.chmod(0o711)
        return self.join(path)

    def join(self, path: Path) -> RunDirectory:
        """A run folder as one of them."""
        for kind, mark in (("owner", self.owner), ("starting", self.mark)):
            (path / kind).unlink(missing_ok=True)
            if mark:
                (path / kind).symlink_to(mark)
        return RunDirectory(path, self)

    def hand_out(self) -> None:
        """From now on the guests are the user's, and outlive the command, if they have no owner."""
        self.mark.unlink()


def is_mark(path: Path) -> bool:
    """Whether ``path``, in the folder of the run folders, is the mark of a batch or of an owner."""
    return path.name.startswith(tuple(f".{kind}-" for kind in _MARKS))


def lock_mark(run: Path, kind: str) -> tuple[Path, int]:
    """A new mark, ``starting``, ``owner`` or ``ending``, and the descriptor that locks it."""
    mark = run / f".{kind}-{secrets.token_hex(8)}"
    fd = os.open(mark, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return mark, fd
