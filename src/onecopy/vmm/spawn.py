"""Start a confined program that inherits only the given descriptors.

Not here: its confinement (confine.py), and the program (qemu_process.py, accel.py).
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
from msgspec.structs import replace

from onecopy.errors import Incompatible, NotPermitted
from onecopy.linux import child_reaper
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
from onecopy.vmm.fork_request import Forked, Listener, ServerEnded, Unanswered, Unserved, ask
from onecopy.vmm.fork_server import ForkServer, forsake
from onecopy.vmm.vmm_user import User

#: QEMU allocates large blocks, mostly virtio queues, of which it uses little. As separate mappings,
#: untouched pages take no memory. The heap grows by no more than QEMU requests. Otherwise such
#: blocks would lie there, too. One arena serves all threads. GLib before 2.76 would keep small
#: blocks of its own, spread over memory that QEMU uses only while starting.
_ENVIRONMENT = {
    "G_SLICE": "always-malloc",
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{setting}"
        for setting in ("arena_max=1", "mmap_threshold=16384", "top_pad=0")
    ),
}

#: Inheritance is set for the whole process. With two concurrent starts, one VMM would inherit, and
#: so keep, the lease of the other.
alone = threading.RLock()


Process = subprocess.Popen[bytes] | Forked


class Started(msgspec.Struct, frozen=True):
    """A confined process, and the listener for its open requests, if it makes them."""

    process: Process
    listener: int | None
    number: int | None = None
    """The listener's number in the process."""
    why_exec: str = ""
    """Why a fork server did not start it although one was to."""


def start(
    argv: Sequence[str],
    confinement: Confinement,
    folder: Path,
    output: int,
    passed: Sequence[int],
    server: ForkServer | None = None,
) -> Started:
    """Start a confined program that inherits only the descriptors ``passed``.

    Args:
        server: have it forked by this server, if that is possible.

    Raises:
        Incompatible: this host cannot confine it.
    """
    if server is None:
        return _execute(argv, confinement, folder, output, passed)
    try:
        return _fork(argv, confinement, folder, output, passed, server)
    except Unserved as error:
        why_exec = str(error)
    except NotPermitted as error:
        why_exec = error.message
    except OSError as error:
        reason = error.strerror
        why_exec = f"the fork server cannot be reached: {reason}" if reason else str(error)
    return replace(_execute(argv, confinement, folder, output, passed), why_exec=why_exec)


def release(process: Process) -> None:
    """Let a process go on without this one."""
    if isinstance(process, Forked):
        process.release()
    elif process.poll() is None:
        # Otherwise Popen would warn that the process is still running.
        process.returncode = 0
        child_reaper.adopt(process.pid)


def _fork(
    argv: Sequence[str],
    confinement: Confinement,
    folder: Path,
    output: int,
    passed: Sequence[int],
    server: ForkServer,
) -> Started:
    with ExitStack() as ends:
        rules = ruleset(argv[0], confinement)
        if rules:
            ends.callback(rules.close)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        ends.callback(os.close, null)
        standard = (null, 0), (output, 1), (output, 2)
        descriptors = [*standard, *((fd, fd) for fd in passed)]

        def attempt() -> tuple[Forked, Listener | None]:
            # The server may have to be started. Its children inherit this.
            with alone, inherited_attributes(), ignored(signal.SIGXFSZ):
                connection = server.connect(argv[0], environment(_ENVIRONMENT))
            fd = rules.fd if rules else None
            try:
                return ask(connection, argv, confinement, folder, descriptors, fd)
            except BaseException as error:
                if isinstance(error, Unanswered):
                    forsake(connection)
                connection.close()
                raise

        try:
            process, listener = attempt()
        except ServerEnded:
            process, listener = attempt()
    started = Started(process, *(listener or (None, None)))
    _limit(started, confinement)
    try:
        process.begin()
    except BaseException:
        _end(started)
        raise
    return started


def _execute(
    argv: Sequence[str], confinement: Confinement, folder: Path, output: int, passed: Sequence[int]
) -> Started:
    """Start a confined program by exec.

    A child inherits credentials, filters and rulesets from the thread that creates it. So a thread
    confines itself, starts the program and ends. Forking would run Python in a child, which is
    unsafe with other threads and slow in a large process.

    Raises:
        Incompatible: this host cannot confine it.
    """
    with alone, ExitStack() as ends, ThreadPoolExecutor(1) as one:
        rules = ruleset(argv[0], confinement)
        if rules:
            ends.callback(rules.close)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        ends.callback(os.close, null)
        ends.enter_context(inherited_only(passed))
        ends.enter_context(inherited_attributes())
        # Writing beyond a file size limit then fails with EFBIG, instead of killing the process.
        ends.enter_context(ignored(signal.SIGXFSZ))
        if confinement.merge:
            ends.enter_context(_mergeable())

        def work() -> Started:
            listener = enter(confinement, rules, folder)
            if listener is not None:
                # Later commands can get it from the VMM while the VMM runs.
                os.set_inheritable(listener, True)
            try:
                process = _spawn(argv, null, output)
            except BaseException:
                if listener is not None:
                    os.close(listener)
                raise
            if listener is not None:
                os.set_inheritable(listener, False)
            return Started(process, listener, listener)

        future = one.submit(work)
        try:
            started = future.result()
        except BaseException:
            # This thread was interrupted, but the program may still start.
            future.add_done_callback(_end_abandoned)
            raise
        _limit(started, confinement)
        return started


def _end_abandoned(future: Future[Started]) -> None:
    """End a program whose caller was interrupted."""
    if not future.cancelled() and not future.exception():
        _end(future.result())


def _end(started: Started) -> None:
    started.process.kill()
    started.process.wait()
    if started.listener is not None:
        os.close(started.listener)


def _limit(started: Started, confinement: Confinement) -> None:
    """Limit a process that has just started and cannot have been compromised yet."""
    pid = started.process.pid
    try:
        as_user(pid, lambda: rlimits.apply(pid, confinement.limits))
    except ProcessLookupError:
        return
    except OSError as error:
        _end(started)
        raise Incompatible(
            f"cannot limit QEMU's use of the host: {error.strerror}",
            hint="run `onecopy doctor` to see what this host supports",
        ) from error


T = TypeVar("T")


def as_user(pid: int, work: Callable[[], T]) -> T:
    """Call ``work``, which affects a process; if root is refused, call it as the process's user.

    Without CAP_SYS_RESOURCE, as in containers, root may limit only processes of its current user.

    Raises:
        OSError: ``work`` was refused.
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
        # Inheritance is already set. Ignored signals stay ignored.
        close_fds=False,
        restore_signals=False,
        start_new_session=True,
    )


@contextmanager
def inherited_only(passed: Sequence[int]) -> Iterator[None]:
    """Let new children inherit the standard descriptors and ``passed``, and no others."""
    # Popen would list /proc/self/fd in the child, which is confined by then.
    before = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of the listing itself is closed by now
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
    """Set the inheritable attributes of this process to what QEMU needs.

    Huge pages are disabled. QEMU requests them for guest RAM and its translation buffer, so a small
    guest would occupy memory that it never touches. The dumpable attribute is preserved.
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
    """Restore the dumpable attribute, which changing a thread's user clears.

    Source:
        PR_SET_DUMPABLE(2const).
    """
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
    """Let KSM merge all memory of new children (PR_SET_MEMORY_MERGE(2const))."""
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
            hint="use Linux 6.4 or later with KSM, or start the guests without --ksm all",
        ) from error
