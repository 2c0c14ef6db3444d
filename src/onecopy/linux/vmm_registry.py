"""Which VMMs run: one small file for each, where no VMM reaches it.

::

    BASE/vmms/STORE=HOLDER=UID=PID-TICKS    its text is the path of the store
    BASE/vmms/==UID=PID-TICKS               a user number, reserved by a command (vmm/free_uids.py)

STORE is device and inode of the store's folder (`store_id`), HOLDER whoever has the lease, UID whom
the VMM runs as. A VMM may drop the locks of its lease, leave its folder and write over its command
line; it cannot become another process (vmm/confine.py: it starts none), so process id and start
time identify it until it ends. The file is made right after the VMM was started, and goes after its
run folder: as long as it is there, its user number has an owner.

Not here: what a holder holds (store/lease.py), how VMMs are told and ended (guest/runtime.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import msgspec

from onecopy.errors import NotFound
from onecopy.linux.lock import alone
from onecopy.linux.process import stat
from onecopy.linux.run_base import make_own, make_run_base, require_own, run_base

_FOLDER = "vmms"
#: In the folder of all run folders of a store: the path of the store.
STORE = ".store"
_NAME = re.compile(
    r"([0-9a-f]+-[0-9a-f]+|)=([a-z0-9][a-z0-9._-]*|)=([0-9]{1,10})=([0-9]{1,10})-([0-9]{1,20})"
)
#: Seconds that a killed process gets to be gone.
_PATIENCE = 10.0
#: How many are ended side by side, with a descriptor each.
_AT_ONCE = 64


class Process(msgspec.Struct, frozen=True):
    """A process, and no later one that has its number."""

    pid: int
    start_ticks: int

    def lives(self) -> bool:
        """Whether it runs; what has ended and only waits to be waited for does not."""
        pidfd = self.opened()
        if pidfd is None:
            return False
        os.close(pidfd)
        return True

    def opened(self) -> int | None:
        """A pidfd; None if it does not run."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except OSError:
            return None
        # Not by the state in /proc: that is Z, too, when only the first thread has ended.
        with contextlib.suppress(NotFound):
            if not has_ended(pidfd, 0) and stat(self.pid).start_ticks == self.start_ticks:
                return pidfd
        os.close(pidfd)
        return None


class Entry(msgspec.Struct, frozen=True):
    """One VMM on record."""

    path: Path
    store: str
    holder: str
    uid: int
    process: Process

    @property
    def root(self) -> Path | None:
        """The folder of its store; None if that is not known."""
        # A store may have been moved since the VMM was started.
        for path in (self.path.parent.parent / self.store / STORE, self.path):
            with contextlib.suppress(OSError):
                if text := path.read_bytes():
                    return Path(os.fsdecode(text))
        return None

    @property
    def is_orphan(self) -> bool:
        """Whether its store is not there any more."""
        root = self.root
        return root is not None and not is_store(root, self.store)

    def forget(self) -> None:
        """Take it off the record."""
        self.path.unlink(missing_ok=True)


def store_id(root: Path) -> str:
    """What a store is called in names: its device and inode. Raises OSError."""
    found = root.stat()
    return f"{found.st_dev:x}-{found.st_ino:x}"


def is_store(root: Path, known: str) -> bool:
    """Whether ``root`` is the folder that had this `store_id`."""
    try:
        return store_id(root) == known
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # it may be there, behind what cannot be looked into


def entries(beginning: str = "") -> list[Entry]:
    """All VMMs on record, of all stores of this user, dead ones too. Raises NotPermitted.

    With a ``beginning`` those whose files' names begin so; that is much faster.
    """
    folder = run_base() / _FOLDER
    names = [name for name in _names(folder) if name.startswith(beginning)]
    return [entry for name in names if (entry := _parsed(folder, name))]


def _names(folder: Path) -> list[str]:
    if not os.path.lexists(folder):
        return []
    # Else others could have made it.
    require_own(folder)
    return os.listdir(folder)  # noqa: PTH208 - each start asks: no time for paths


def _parsed(folder: Path, name: str) -> Entry | None:
    if not (match := _NAME.fullmatch(name)):
        return None
    store, holder, uid, pid, ticks = match.groups()
    return Entry(folder / name, store, holder, int(uid), Process(int(pid), int(ticks)))


def of_store(store: str) -> list[Entry]:
    """The VMMs on record of one store."""
    return entries(f"{store}=")


def of_holder(store: str, holder: str) -> list[Entry]:
    """Those of one holder, of which all but one have ended."""
    return entries(f"{store}={holder}=")


def users() -> set[int]:
    """The user numbers of VMMs that live, or of whom a file is left."""
    return {int(parts[2]) for parts in _parts() if parts[2].isdecimal()}


def stores() -> set[str]:
    """The stores (`store_id`) of the VMMs on record."""
    return {parts[0] for parts in _parts() if parts[0]}


def _parts() -> list[list[str]]:
    split = [name.split("=") for name in _names(run_base() / _FOLDER)]
    return [parts for parts in split if len(parts) == 4]


def holders(root: Path) -> set[str]:
    """Who holds something of a store because a VMM of theirs lives."""
    return {each.holder for each in of_store(store_id(root)) if each.process.lives()}


def holds(root: Path, holder: str) -> bool:
    """Whether a VMM of ``holder`` lives."""
    return any(each.process.lives() for each in of_holder(store_id(root), holder))


def register(run: Path, process: Process, uid: int) -> None:
    """Put a VMM on record that was started in the run folder ``run`` (.../STORE/HOLDER)."""
    if run.parent.parent != run_base():
        return  # no guest of a store
    folder = make_own(make_run_base() / _FOLDER)
    store, holder = run.parent.name, run.name
    text = b""
    with contextlib.suppress(OSError):
        text = (run.parent / STORE).read_bytes()
    _write(folder / _named(store, holder, uid, process), text)
    for old in of_holder(store, holder):
        if not old.process.lives():
            old.forget()
    for reserved in entries(f"=={uid}="):
        # Now it is the VMM's.
        reserved.forget()


def _named(store: str, holder: str, uid: int, process: Process) -> str:
    return f"{store}={holder}={uid}={process.pid}-{process.start_ticks}"


def _write(path: Path, text: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, text)
    finally:
        os.close(fd)


@contextlib.contextmanager
def reserving() -> Iterator[Callable[[int], None]]:
    """Nobody else is here meanwhile; what this yields makes a user number this process's."""
    folder = make_own(make_run_base() / _FOLDER)
    me = Process(os.getpid(), stat(os.getpid()).start_ticks)

    def reserve(uid: int) -> None:
        _write(folder / _named("", "", uid, me), b"")

    with alone(folder / ".lock"):
        for each in entries("=="):
            if not each.process.lives():
                each.forget()
        yield reserve


def rename(root: Path, holder: str, name: str) -> None:
    """Let the VMMs of a holder have another name."""
    for entry in of_holder(store_id(root), holder):
        new = _named(entry.store, name, entry.uid, entry.process)
        entry.path.rename(entry.path.with_name(new))


def end(processes: Iterable[Process]) -> list[Process]:
    """End processes, unasked, and wait for them; those that are not gone by then."""
    left, rest = [], iter(processes)
    while some := list(islice(rest, _AT_ONCE)):
        with contextlib.ExitStack() as ends:
            dying = list(_killed(some, ends))
            left += [each for each, pidfd in dying if not has_ended(pidfd, _PATIENCE)]
    return left


def _killed(
    processes: Iterable[Process], ends: contextlib.ExitStack
) -> Iterator[tuple[Process, int]]:
    for each in processes:
        pidfd = each.opened()
        if pidfd is not None:
            ends.callback(os.close, pidfd)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            yield each, pidfd


def has_ended(pidfd: int, patience: float) -> bool:
    """Wait up to ``patience`` seconds for the end of a process; whether it has ended."""
    poll = select.poll()  # select() knows no descriptor above 1023
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(patience * 1000))
