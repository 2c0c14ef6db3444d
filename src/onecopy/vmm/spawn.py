"""Starting a confined program, which inherits what it is given and nothing else.

Not here: what it may (confine.py), what it is (qemu_process.py, accel.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from onecopy.errors import Incompatible
from onecopy.linux.sandbox import rlimits
from onecopy.linux.syscall import (
    PR_GET_DUMPABLE,
    PR_GET_MEMORY_MERGE,
    PR_GET_THP_DISABLE,
    PR_SET_DUMPABLE,
    PR_SET_MEMORY_MERGE,
    PR_SET_THP_DISABLE,
    ignored,
    prctl,
)
from onecopy.subprocesses import environment
from onecopy.vmm.confine import Confinement, enter, ruleset
from onecopy.vmm.vmm_user import User

#: What QEMU allocates in blocks of some size, mostly queues of virtio devices, it hardly touches:
#: as mappings of their own untouched pages take no memory. One arena holds the rest of all threads.
_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=16384"}

#: What children inherit is set for the whole process: with two starts at once one VMM would get,
#: and so keep, the lease of the other's.
alone = threading.RLock()


class Started(msgspec.Struct, frozen=True):
    """A confined process, and where its questions come in if it asks."""

    process: subprocess.Popen[bytes]
    listener: int | None


def start(
    argv: Sequence[str], confinement: Confinement, folder: Path, output: int, passed: Sequence[int]
) -> Started:
    """Start a program that works in ``folder`` and writes to ``output``, confined.

    It inherits the descriptors ``passed`` and no other. Raises Incompatible if this host cannot
    confine it.

    Credentials, filters and rulesets belong to a thread, and a child has those of the thread that
    made it. So a thread of ours confines itself, starts the program and ends: no code of ours runs
    in a copy of this process, which takes longer the larger it is and is unsafe with other threads.
    """
    with alone, ExitStack() as ends, ThreadPoolExecutor(1) as one:
        rules = ruleset(argv[0], confinement)
        if rules:
            ends.callback(rules.close)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        ends.callback(os.close, null)
        ends.enter_context(inherited_only(passed))
        ends.enter_context(inherited_attributes())
        # Where a file may not grow it gets EFBIG, not a signal that ends it.
        ends.enter_context(ignored(signal.SIGXFSZ))
        if confinement.merge:
            ends.enter_context(_mergeable())

        def work() -> Started:
            listener = enter(confinement, rules, folder)
            if listener is not None:
                # It can be asked of the VMM as long as that lives.
                os.set_inheritable(listener, True)
            try:
                process = _spawn(argv, null, output)
            except BaseException:
                if listener is not None:
                    os.close(listener)
                raise
            if listener is not None:
                os.set_inheritable(listener, False)
            return Started(process, listener)

        begun = one.submit(work)
        try:
            started = begun.result()
        except BaseException:
            # We are interrupted, and it may be started all the same.
            begun.add_done_callback(_lost)
            raise
        _limit(started, confinement)
        return started


def _lost(begun: Future[Started]) -> None:
    """End a program that nobody waits for any more."""
    if not begun.cancelled() and not begun.exception():
        _end(begun.result())


def _end(started: Started) -> None:
    started.process.kill()
    started.process.wait()
    if started.listener is not None:
        os.close(started.listener)


def _limit(started: Started, confinement: Confinement) -> None:
    """Limit what has just been started, and has seen nothing yet that could make it misbehave."""
    pid = started.process.pid
    try:
        as_user(pid, lambda: rlimits.apply(pid, confinement.limits))
    except ProcessLookupError:
        return
    except OSError as error:
        _end(started)
        raise Incompatible(
            f"QEMU's use of the host cannot be limited: {error.strerror}",
            hint="`onecopy doctor` says what this host can do",
        ) from error


T = TypeVar("T")


def as_user(pid: int, work: Callable[[], T]) -> T:
    """Do ``work`` on a process of ours; if need be as its user; raise OSError.

    Without CAP_SYS_RESOURCE, as in containers, root may limit the processes of the user that it is,
    and no other's.
    """
    try:
        return work()
    except PermissionError:
        user = User.of(pid)
        if os.geteuid() or not user:
            raise

    def become_and_work() -> T:
        user.become()
        return work()

    with alone, _dumpable(), ThreadPoolExecutor(1) as one:
        return one.submit(become_and_work).result()


def _spawn(argv: Sequence[str], null: int, output: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        stdin=null,
        stdout=output,
        stderr=output,
        env=environment(_ENVIRONMENT),
        # What is inherited is set already; signals are ignored as we ignore them.
        close_fds=False,
        restore_signals=False,
        start_new_session=True,
    )


@contextmanager
def inherited_only(passed: Sequence[int]) -> Iterator[None]:
    """Let new children inherit the standard descriptors and ``passed``, and no other."""
    # Popen's own closing lists /proc/self/fd in the child, which is confined by then.
    before = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own is closed by now
            before[int(entry.name)] = os.get_inheritable(int(entry.name))
    change = {fd: fd in passed for fd in before if fd > 2 and before[fd] != (fd in passed)}
    try:
        for fd, inherit in change.items():
            os.set_inheritable(fd, inherit)
        yield
    finally:
        for fd in change:
            os.set_inheritable(fd, before[fd])


@contextmanager
def inherited_attributes() -> Iterator[None]:
    """Have what is the whole process's, and passes on to children, as QEMU should have it.

    No huge pages: QEMU asks for them for guest RAM and for its translation buffer, and a small
    guest would then occupy memory that it never touches. And what `_dumpable` keeps.
    """
    huge = prctl(PR_GET_THP_DISABLE)
    prctl(PR_SET_THP_DISABLE, 1)
    try:
        with _dumpable():
            yield
    finally:
        prctl(PR_SET_THP_DISABLE, huge)


@contextmanager
def _dumpable() -> Iterator[None]:
    """A thread that becomes another user makes its process undumpable (PR_SET_DUMPABLE(2const))."""
    dumpable = prctl(PR_GET_DUMPABLE)
    try:
        yield
    finally:
        if dumpable == 1:
            prctl(PR_SET_DUMPABLE, 1)


def require_merging() -> None:
    """Raise Incompatible if this kernel's KSM cannot merge a whole process's memory."""
    with _merging_errors():
        prctl(PR_GET_MEMORY_MERGE)


@contextmanager
def _mergeable() -> Iterator[None]:
    """Let new children have all their memory open to KSM (PR_SET_MEMORY_MERGE(2const))."""
    with _merging_errors():
        before = prctl(PR_GET_MEMORY_MERGE)
        prctl(PR_SET_MEMORY_MERGE, 1)
    try:
        yield
    finally:
        prctl(PR_SET_MEMORY_MERGE, before)


@contextmanager
def _merging_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Incompatible(
            "this kernel does not let KSM merge QEMU's own memory",
            hint="that takes Linux 6.4 with KSM; start the guests without --ksm all",
        ) from error
