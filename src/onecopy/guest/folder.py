"""Run folders: what a running guest has on the host, and how a dead one is swept.

    RUN/NAME/
        guest.json      what it is; written once the guest is up
        starting        link to the mark of the command that starts it; leads nowhere afterwards
        monitor.sock    QMP; monitor.lock is held by the command that speaks it
        agent.in .out   pipes to the guest agent, agent.lock beside them
        identity.in .out  pipes to the guest's identity script
        exec.TAG        locked by the command that runs a program in the guest
        console.sock    the serial console; console.log keeps all it said
        qemu.log        what QEMU itself said

    What QEMU opens there by itself (pipes, console.log) is its user's; the folder and all else is
    ours, so that QEMU makes and replaces nothing (vmm/confine.py).

    RUN/.starting-ID    locked by a command that starts guests; gone when they are handed out

A guest exists as long as its VMM holds its lease in the store (store/lease.py). A folder without
a live lease is a leftover; so is a VMM whose mark nobody locks any more: both are swept by the next
command.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from onecopy.errors import NotFound
from onecopy.host.lock import is_held
from onecopy.store import Store

_MARK = ".starting-"


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
    segments: dict[str, str]
    """Path of each mapped blob -> name."""
    publish: tuple[tuple[int, int], ...] = ()
    """(port on 127.0.0.1, port of the guest) pairs."""
    schema: int = 1


def run_root(store: Store) -> Path:
    """The run folders of the guests of a store."""
    if os.geteuid() == 0:
        base = Path("/run/onecopy")
    else:
        base = Path(os.environ.get("XDG_RUNTIME_DIR", f"/tmp/onecopy-{os.geteuid()}")) / "onecopy"  # noqa: S108
    stat = store.root.stat()
    # Short, since socket paths must be (unix(7): 108 bytes), and one for each store.
    return base / f"{stat.st_dev:x}-{stat.st_ino:x}"


class GuestFolder:
    """The run folder of one guest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name

    def record(self) -> GuestRecord:
        """Read guest.json; raise NotFound while the guest is not handed out."""
        try:
            text = (self.path / "guest.json").read_bytes()
        except FileNotFoundError:
            text = b""
        if not text or self._mark.exists():
            raise NotFound(
                f"there is no guest {self.name!r}", hint="`onecopy ps` lists the running guests"
            )
        return msgspec.json.decode(text, type=GuestRecord)

    def write(self, record: GuestRecord) -> None:
        """Note what the guest is, now that it is up."""
        temporary = self.path / "guest.json.tmp"
        temporary.write_bytes(msgspec.json.encode(record))
        temporary.rename(self.path / "guest.json")

    @property
    def abandoned(self) -> bool:
        """Whether the command that was starting this guest is gone."""
        return self._mark.exists() and not is_held(self._mark.resolve())

    @property
    def _mark(self) -> Path:
        return self.path / "starting"

    def remove(self) -> None:
        """Remove the folder; its VMM must be gone."""
        shutil.rmtree(self.path, ignore_errors=True)

    def find_vmm(self) -> int | None:
        """Process id of the VMM; None if there is none.

        It is the process that was started as this guest and works in this folder, which nobody
        else can enter.
        """
        mark = f"\0-name\0guest={self.name}\0".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    started = mark in (entry / "cmdline").read_bytes()
                    if started and self.path.samefile(entry / "cwd"):
                        return int(entry.name)
        return None


@dataclass(frozen=True, slots=True)
class Batch:
    """Guests that one command starts: they become the user's all at once, or none of them does.

    Made while no sweeper runs.
    """

    mark: Path

    def add(self, path: Path) -> GuestFolder:
        """A new run folder for one of them; the caller ends its VMM and removes it if it fails."""
        if path.exists():  # its lease was free: what is here is a leftover
            shutil.rmtree(path)
        path.mkdir()
        # Its VMM may be another user, who has no more than the way to what is made for it there.
        path.chmod(0o711)
        (path / "starting").symlink_to(self.mark)
        return GuestFolder(path)

    def hand_out(self) -> None:
        """From now on the guests are the user's, and outlive the command."""
        self.mark.unlink()


def is_mark(path: Path) -> bool:
    """Whether ``path``, in the folder of the run folders, is the mark of a batch."""
    return path.name.startswith(_MARK)


def lock_mark(run: Path) -> tuple[Path, int]:
    """A new mark, and the descriptor that locks it."""
    mark = run / f"{_MARK}{secrets.token_hex(8)}"
    fd = os.open(mark, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return mark, fd


def kill(pid: int, is_it: Callable[[], bool]) -> None:
    """End a VMM and wait for it; nothing happens unless ``pid`` still ``is_it``."""
    import select

    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            if is_it():
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], 10)
        finally:
            os.close(pidfd)
