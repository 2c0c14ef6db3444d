"""Programs of the host that read foreign data: each confined, limited, and ended in time.

Such a program (a decompressor, mkfs, fsck) may hold a hole that the data was made for. So it runs
as a user of its own where root starts it, without network, and reaches nothing but the open files
that it is given, by their names /proc/self/fd/N. Not here: which programs, and on what.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import selectors
import shlex
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from onecopy.errors import CommandFailed, Incompatible
from onecopy.linux.mount import mount_over
from onecopy.linux.sandbox import landlock, seccomp
from onecopy.linux.sandbox.landlock import EXECUTE, READ_DIR, READ_FILE, WRITE_FILE, Ruleset
from onecopy.linux.syscall import PR_SET_NO_NEW_PRIVS, prctl, set_capabilities, unshare_folder
from onecopy.model import format_size
from onecopy.subprocesses import find_program, keep
from onecopy.vmm.passed_files import READ, WRITE
from onecopy.vmm.spawn import alone, inherited_attributes, inherited_only
from onecopy.vmm.vmm_user import User, new_user

#: Right to read a folder and all below it.
READ_TREE = READ_FILE | READ_DIR
#: CAP_DAC_READ_SEARCH: read files of any owner, as far as ``rights`` go.
READ_ANY = 1 << 2

_PROGRAMS = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
#: Bytes kept of standard error: the first half of it, and the last.
_SAID = 64 << 10
_OUT_OF_MEMORY = ("annot allocate memory", "emory exhausted", "ut of memory", "emory allocation")
#: Network, other processes, and other views of files: socket, socketpair, io_uring_setup; ptrace,
#: process_vm_readv and _writev, shmget, userfaultfd, bpf; perf_event_open, keyctl, unshare, setns,
#: mount, umount2, pivot_root, move_mount, fsopen, open_tree, mount_setattr, open_by_handle_at.
_DENIED = (
    *(seccomp.SOCKET, seccomp.SOCKETPAIR, seccomp.IO_URING_SETUP, 101, 310, 311, 29, 323, 321),
    *(298, 250, 272, 308, 165, 166, 155, 429, 430, 428, 442, 304),
    # And what CAP_SYS_ADMIN would open: swapon, swapoff, sethostname, setdomainname, quotactl,
    # quotactl_fd, fanotify_init, syslog, acct, add_key, request_key.
    *(167, 168, 170, 171, 179, 443, 300, 103, 163, 248, 249),
)


class Limits(msgspec.Struct, frozen=True):
    """What a tool may take of the host; sizes in bytes."""

    seconds: float = 600
    """From its start to its end; as much of a processor, too."""
    memory: int = 1 << 30
    """Of addresses (RLIMIT_AS)."""
    file_size: int = 0
    """Of a file that it writes (RLIMIT_FSIZE)."""
    processes: int = 1
    """Where it has a user of its own (RLIMIT_NPROC)."""
    files: int = 1024
    """Open at once (RLIMIT_NOFILE). mkfs.erofs 1.8 opens hundreds, which wait for its threads."""
    output: int = 1 << 20
    """On standard output, where that is kept."""


class Task(msgspec.Struct, frozen=True):
    """A program to run, and all that it is given."""

    argv: Sequence[str]
    rights: Mapping[int, int] = {}
    """Open file or folder -> what for it may be opened anew, as /proc/self/fd/N (landlock.py).

    One that may be written to is the tool's own meanwhile.
    """
    stdin: int | None = None
    """None: /dev/null."""
    stdout: int | None = None
    """None: what it prints is returned."""
    over: Mapping[int, Path] = {}
    """Open mount -> the folder in whose place the tool has it, and nobody else."""
    capabilities: int = 0
    """What it keeps of ours (capabilities(7))."""
    environment: Mapping[str, str] = {}
    kvm: bool = False
    """Whether it uses /dev/kvm, for which ``rights`` must have it, too."""
    limits: Limits = Limits()


class Ran(msgspec.Struct, frozen=True):
    """How a tool ended, and what it printed on its standard streams."""

    code: int
    out: str
    err: str


def named(fd: int) -> str:
    """The name by which a tool finds an open file."""
    return f"/proc/self/fd/{fd}"


def run_tool(task: Task, *, fine: Sequence[int] = (0,)) -> Ran:
    """Run a program to its end, confined.

    Raises CommandFailed for an exit code that is not ``fine`` and, with its ``limit`` set, for a
    program that took more than it may; MissingProgram; Incompatible if this host cannot confine it.
    """
    with running(task) as tool:
        return tool.finish(fine)


def run_on_file(
    argv: Sequence[str], file: int, *, fine: Sequence[int] = (0,), rights: int = WRITE
) -> Ran:
    """Run a program on an open file, whose name becomes its last argument; it changes no other.

    With ``rights`` `READ` it does not change that either. Raises what `run_tool` raises.
    """
    # Programs for file systems look there whether it is mounted.
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        limits = Limits(seconds=3600, memory=4 << 30, file_size=os.fstat(file).st_size)
        task = Task([*argv, named(file)], {file: rights, proc: READ}, limits=limits)
        return run_tool(task, fine=fine)
    finally:
        os.close(proc)


@contextmanager
def running(task: Task) -> Iterator[Tool]:
    """A program that runs while the block does, at whose end it is ended.

    Raises what `run_tool` raises, but for its failing: that is told by `Tool.finish`.
    """
    line = [find_program(task.argv[0]), *task.argv[1:]]
    user = new_user("kvm" if task.kvm else "tcg")
    with ExitStack() as ends:
        if user:
            for fd in filter(_is_regular, [fd for fd, r in task.rights.items() if r & WRITE_FILE]):
                before = os.fstat(fd)
                user.own(fd)
                ends.callback(os.fchown, fd, before.st_uid, before.st_gid)
        tool = Tool(line, task, user)
        ends.callback(tool.end)
        yield tool


class Tool:
    """A confined program while it runs."""

    def __init__(self, line: Sequence[str], task: Task, user: User | None) -> None:
        """Start it: see `running`."""
        self._line, self._task, self._user = line, task, user
        self._deadline = time.monotonic() + task.limits.seconds
        self._out, self._err = bytearray(), bytearray()
        self._over = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: BaseException | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        with alone, ExitStack() as ends:
            self._rules = _ruleset(task)
            if self._rules:
                ends.callback(self._rules.close)
            ends.enter_context(inherited_only([*task.rights]))
            ends.enter_context(inherited_attributes())
            self._thread.start()
            self._begun.wait()
        if self._failure:
            self._thread.join()
            raise self._failure

    def finish(self, fine: Sequence[int] = (0,)) -> Ran:
        """Wait for its end; raise CommandFailed."""
        self._thread.join()
        assert self._process  # noqa: S101 - for the type checker
        code = self._process.returncode
        err = self._err.decode(errors="replace")
        over = self._over or _limit_reached(code, err)
        if over or code not in fine:
            output = f"{err}\n{self._out.decode(errors='replace')}".strip()
            limit = (over, _allowed(self._task.limits, over)) if over else None
            raise CommandFailed(shlex.join(self._line), code, output, limit=limit)
        return Ran(code, self._out.decode(errors="replace"), err)

    def end(self) -> None:
        """End it if it still runs, and all that it started."""
        if self._thread.is_alive():
            self._kill("")
            self._thread.join()

    def _work(self) -> None:
        """Start it and see it to its end, in a thread that is confined as it is.

        Credentials, filters and rulesets belong to a thread, and a child has those of the thread
        that made it; the end of that thread, and so of this process, ends the tool.
        """
        try:
            self._confine()
            self._process, pipes = self._start()
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._begun.set()
        try:
            self._attend(self._process.pid, pipes)
        finally:
            self._kill("")
            self._process.wait()
            for pipe in pipes:
                os.close(pipe)

    def _confine(self) -> None:
        try:
            unshare_folder()
            os.umask(0o022)
            if self._task.over:
                mount_over(self._task.over)
            os.chdir("/")
            if self._user:
                self._user.become(self._task.capabilities)
            else:
                set_capabilities(self._task.capabilities)
            prctl(PR_SET_NO_NEW_PRIVS, 1)
            if self._rules:
                self._rules.restrict_self()
            seccomp.install(_filter(), listen=False)
        except OSError as error:
            raise Incompatible(
                f"{self._task.argv[0]} cannot be confined on this host: {error.strerror}",
                hint="`onecopy doctor` says what this host can do",
            ) from error

    def _start(self) -> tuple[subprocess.Popen[bytes], dict[int, bytearray]]:
        with ExitStack() as ends:
            null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            ends.callback(os.close, null)
            said, err = os.pipe()
            ends.callback(os.close, err)
            pipes, out = {said: self._err}, self._task.stdout
            if out is None:
                printed, out = os.pipe()
                ends.callback(os.close, out)
                pipes[printed] = self._out
            process = subprocess.Popen(
                [*_limited(self._task.limits, own_user=bool(self._user)), *self._line],
                stdin=null if self._task.stdin is None else self._task.stdin,
                stdout=out,
                stderr=err,
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
                | dict(self._task.environment),
                # What is inherited is set already.
                close_fds=False,
                start_new_session=True,
            )
            return process, pipes

    def _attend(self, pid: int, pipes: Mapping[int, bytearray]) -> None:
        """Read what it prints until it ends, or its time is up."""
        pidfd = os.pidfd_open(pid)
        with ExitStack() as ends, selectors.DefaultSelector() as selector:
            ends.callback(os.close, pidfd)
            for fd in (pidfd, *pipes):
                selector.register(fd, selectors.EVENT_READ)
            for fd in pipes:
                os.set_blocking(fd, False)
            ended = False
            while not ended and not self._over:
                ready = selector.select(max(0, self._deadline - time.monotonic()))
                if not ready:
                    self._kill("time")
                # What was printed before the end is there when the end is.
                ended = any(key.fd == pidfd for key, _ in ready)
                for fd, kept in pipes.items():
                    if not self._read(fd, kept) and fd in selector.get_map():
                        selector.unregister(fd)

    def _read(self, fd: int, kept: bytearray) -> bool:
        """Take what is there; whether more can come."""
        with contextlib.suppress(BlockingIOError):
            # As much as a pipe holds, and no more: the deadline is looked at in between.
            for _ in range(16):
                data = os.read(fd, 64 << 10)
                if not data:
                    return False
                keep(kept, data, _SAID if kept is self._err else None)
                if kept is self._out and len(kept) > self._task.limits.output:
                    self._kill("output")
                    return False
        return True

    def _kill(self, over: str) -> None:
        self._over = self._over or over
        if self._process:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


def _is_regular(fd: int) -> bool:
    """Whether it is a file: a device stays its owner's, and so does a folder."""
    return stat.S_ISREG(os.fstat(fd).st_mode)


def _ruleset(task: Task) -> Ruleset | None:
    """Landlock's rules for it, to be closed; None on a kernel without it."""
    version = landlock.abi()
    if not version:
        if task.capabilities:
            raise Incompatible(
                f"{task.argv[0]} cannot be confined: this kernel has no Landlock",
                hint="add landlock to the kernel's parameter lsm=",
            )
        return None
    rules = Ruleset(version)
    try:
        rules.allow_paths(_PROGRAMS, READ_TREE | EXECUTE)
        rules.allow_paths(["/dev/null"], WRITE)
        rules.allow_paths(["/dev/urandom", "/proc/filesystems"], READ)
        for fd, right in task.rights.items():
            rules.allow(fd, right)
    except BaseException:
        rules.close()
        raise
    return rules


def _filter() -> bytes:
    return seccomp.program(seccomp.deny((*_DENIED, *seccomp.CHANGE_RIGHTS), errno.EPERM))


def _limited(limits: Limits, *, own_user: bool) -> list[str]:
    """What sets the limits, and executes what follows."""
    options: dict[str, int | str] = {
        "as": limits.memory,
        "core": 0,
        # At the hard limit it would be killed, which does not say why.
        "cpu": f"{math.ceil(limits.seconds)}:{math.ceil(limits.seconds) + 1}",
        "fsize": limits.file_size,
        "nofile": limits.files,
    }
    if own_user:
        # The thread that started it is this user's, too.
        options["nproc"] = limits.processes + 1
    texts = [f"--{option}={value}" for option, value in options.items()]
    end_with_us = [find_program("setpriv"), "--pdeathsig", "KILL", "--"]
    return [*end_with_us, find_program("prlimit"), *texts, "--"]


def _limit_reached(code: int, err: str) -> str:
    if code in (-signal.SIGXCPU, -signal.SIGXFSZ):
        return "time" if code == -signal.SIGXCPU else "file size"
    if code and any(sign in err for sign in _OUT_OF_MEMORY):
        return "memory"
    return "file size" if code and os.strerror(errno.EFBIG) in err else ""


def _allowed(limits: Limits, over: str) -> str:
    sizes = {"memory": limits.memory, "file size": limits.file_size, "output": limits.output}
    return format_size(sizes[over]) if over in sizes else f"{limits.seconds:g} s"
