"""The registry of running VMMs: one small file for each, out of reach of the VMMs.

    BASE/vmms/STORE=HOLDER=UID=PID-TICKS    contains the path of the store
    BASE/vmms/==UID=PID-TICKS               a user id that a command reserves (vmm/free_uids.py)

STORE is the device and inode of the store's directory (`store_id`), HOLDER the holder of the lease,
UID the user that the VMM runs as. A compromised VMM may drop the locks of its lease, leave its
directory and overwrite its command line. It cannot become another process, because it may not start
any (vmm/confine.py). So pid and start time identify it until it ends. The file is created right
after the VMM starts, and removed after its run directory. Its user id is taken until then.

Not here: what a holder holds (store/lease.py), and how VMMs are found and ended (guest/runtime.py).
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
from onecopy.linux.lock import locked_blocking
from onecopy.linux.process import stat
from onecopy.linux.run_base import make_own, make_run_base, require_own, run_base

_DIRECTORY = "vmms"
#: A file beside the run directories of a store that contains the store's path.
STORE = ".store"
_NAME = re.compile(
    r"([0-9a-f]+-[0-9a-f]+|)=([a-z0-9][a-z0-9._-]*|)=([0-9]{1,10})=([0-9]{1,10})-([0-9]{1,20})"
)
#: Seconds to wait for the end of a killed process.
_PATIENCE = 10.0
#: The number of processes that are ended at the same time, with one descriptor each.
_AT_ONCE = 64


class Process(msgspec.Struct, frozen=True):
    """A process, identified by its start time too, because the kernel reuses pids."""

    pid: int
    start_ticks: int

    def lives(self) -> bool:
        """Whether the process runs; False for a zombie."""
        pidfd = self.open_pidfd()
        if pidfd is None:
            return False
        os.close(pidfd)
        return True

    def open_pidfd(self) -> int | None:
        """Open a pidfd of the process; return None if it does not run."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except OSError:
            return None
        # The state in /proc would not do: it is Z also when only the main thread has ended.
        with contextlib.suppress(NotFound):
            if not has_ended(pidfd, 0) and stat(self.pid).start_ticks == self.start_ticks:
                return pidfd
        os.close(pidfd)
        return None


class Entry(msgspec.Struct, frozen=True):
    """The registry's entry of one VMM."""

    path: Path
    store: str
    holder: str
    uid: int
    process: Process

    @property
    def root(self) -> Path | None:
        """The directory of the VMM's store; None if unknown."""
        # The store may have been moved since the VMM started, so the current path comes first.
        for path in (self.path.parent.parent / self.store / STORE, self.path):
            with contextlib.suppress(OSError):
                if text := path.read_bytes():
                    return Path(os.fsdecode(text))
        return None

    @property
    def is_orphan(self) -> bool:
        """Whether the VMM's store no longer exists."""
        root = self.root
        return root is not None and not is_store(root, self.store)

    def forget(self) -> None:
        """Remove the entry from the registry."""
        self.path.unlink(missing_ok=True)


def store_id(root: Path) -> str:
    """Return the name of a store in the registry: its device and inode.

    Raises:
        OSError: the store's directory cannot be accessed.
    """
    found = root.stat()
    return f"{found.st_dev:x}-{found.st_ino:x}"


def is_store(root: Path, known: str) -> bool:
    """Whether ``root`` still is the directory with this `store_id`."""
    try:
        return store_id(root) == known
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # it may exist in a directory that this user cannot search


def entries(beginning: str = "") -> list[Entry]:
    """List the registered VMMs of all stores of this user, ended ones included.

    Args:
        beginning: list only files with this prefix, which is much faster.

    Raises:
        NotPermitted: other users can access the registry.
    """
    directory = run_base() / _DIRECTORY
    names = [name for name in _names(directory) if name.startswith(beginning)]
    return [entry for name in names if (entry := _parse(directory, name))]


def _names(directory: Path) -> list[str]:
    if not os.path.lexists(directory):
        return []
    # Otherwise another user could have created it.
    require_own(directory)
    return os.listdir(directory)  # noqa: PTH208 - each start of a guest calls this, and Path is slower


def _parse(directory: Path, name: str) -> Entry | None:
    if not (match := _NAME.fullmatch(name)):
        return None
    store, holder, uid, pid, ticks = match.groups()
    return Entry(directory / name, store, holder, int(uid), Process(int(pid), int(ticks)))


def of_store(store: str) -> list[Entry]:
    """List the registered VMMs of a store."""
    return entries(f"{store}=")


def of_holder(store: str, holder: str) -> list[Entry]:
    """List the registered VMMs of a holder; all but one have ended."""
    return entries(f"{store}={holder}=")


def users() -> set[int]:
    """Return the user ids of all entries, whether or not their VMMs still run."""
    return {int(parts[2]) for parts in _split_names() if parts[2].isdecimal()}


def stores() -> set[str]:
    """Return the stores (`store_id`) of all entries."""
    return {parts[0] for parts in _split_names() if parts[0]}


def _split_names() -> list[list[str]]:
    split = [name.split("=") for name in _names(run_base() / _DIRECTORY)]
    return [parts for parts in split if len(parts) == 4]


def holders(root: Path) -> set[str]:
    """Return the holders that hold parts of a store because their VMM runs."""
    return {each.holder for each in of_store(store_id(root)) if each.process.lives()}


def holds(root: Path, holder: str) -> bool:
    """Whether a VMM of ``holder`` runs."""
    return any(each.process.lives() for each in of_holder(store_id(root), holder))


def register(run: Path, process: Process, uid: int) -> None:
    """Register a VMM.

    Args:
        run: its run directory, .../STORE/HOLDER.
        uid: the user that it runs as.
    """
    if run.parent.parent != run_base():
        return  # not a guest of a store
    directory = make_own(make_run_base() / _DIRECTORY)
    store, holder = run.parent.name, run.name
    text = b""
    with contextlib.suppress(OSError):
        text = (run.parent / STORE).read_bytes()
    _write(directory / _file_name(store, holder, uid, process), text)
    for old in of_holder(store, holder):
        if not old.process.lives():
            old.forget()
    for reserved in entries(f"=={uid}="):
        # The user id is the VMM's now.
        reserved.forget()


def _file_name(store: str, holder: str, uid: int, process: Process) -> str:
    return f"{store}={holder}={uid}={process.pid}-{process.start_ticks}"


def _write(path: Path, text: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, text)
    finally:
        os.close(fd)


@contextlib.contextmanager
def reserving() -> Iterator[Callable[[int], None]]:
    """Lock the reservations of user ids; yield a function that reserves one for this process."""
    directory = make_own(make_run_base() / _DIRECTORY)
    me = Process(os.getpid(), stat(os.getpid()).start_ticks)

    def reserve(uid: int) -> None:
        _write(directory / _file_name("", "", uid, me), b"")

    with locked_blocking(directory / ".lock"):
        for each in entries("=="):
            if not each.process.lives():
                each.forget()
        yield reserve


def rename(root: Path, holder: str, name: str) -> None:
    """Rename the holder of registered VMMs."""
    for entry in of_holder(store_id(root), holder):
        new = _file_name(entry.store, name, entry.uid, entry.process)
        entry.path.rename(entry.path.with_name(new))


def end(processes: Iterable[Process]) -> list[Process]:
    """Kill processes and wait for their end; return those that have not ended in time."""
    left, rest = [], iter(processes)
    while batch := list(islice(rest, _AT_ONCE)):
        with contextlib.ExitStack() as ends:
            dying = list(_kill(batch, ends))
            left += [each for each, pidfd in dying if not has_ended(pidfd, _PATIENCE)]
    return left


def _kill(
    processes: Iterable[Process], ends: contextlib.ExitStack
) -> Iterator[tuple[Process, int]]:
    for each in processes:
        pidfd = each.open_pidfd()
        if pidfd is not None:
            ends.callback(os.close, pidfd)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            yield each, pidfd


def has_ended(pidfd: int, patience: float | None) -> bool:
    """Wait up to ``patience`` seconds for the end of a process; return whether it has ended.

    None waits for ever.
    """
    poll = select.poll()  # select() fails for descriptors above 1023
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if patience is None else patience * 1000))
