"""Run host programs that parse untrusted data: confined, with limits and a deadline.

Such a program (a decompressor, mkfs, fsck) may have a vulnerability that the data exploits. So it
runs without network, and as a user of its own if root starts it. It reaches only open files that it
is given, as /proc/self/fd/N.

Not here: which programs run, and on which data.
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
from onecopy.linux.syscall import PR_SET_NO_NEW_PRIVS, prctl, set_capabilities, unshare_directory
from onecopy.model import format_size
from onecopy.subprocesses import find_program, keep
from onecopy.vmm.passed_files import READ, WRITE
from onecopy.vmm.spawn import alone, inherited_attributes, inherited_only
from onecopy.vmm.vmm_user import User, new_user

#: The right to read a directory and everything below it.
READ_TREE = READ_FILE | READ_DIR
#: CAP_DAC_READ_SEARCH: read files of any owner, as far as ``rights`` allow.
READ_ANY = 1 << 2

_PROGRAMS = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
#: Bytes of standard error that are kept: its beginning and its end.
_STDERR_LIMIT = 64 << 10
_OUT_OF_MEMORY = ("annot allocate memory", "emory exhausted", "ut of memory", "emory allocation")
#: Network, other processes and other access to files: socket, socketpair, io_uring_setup; ptrace,
#: process_vm_readv and _writev, shmget, userfaultfd, bpf; perf_event_open, keyctl, unshare, setns,
#: mount, umount2, pivot_root, move_mount, fsopen, open_tree, mount_setattr, open_by_handle_at.
_DENIED = (
    *(seccomp.SOCKET, seccomp.SOCKETPAIR, seccomp.IO_URING_SETUP, 101, 310, 311, 29, 323, 321),
    *(298, 250, 272, 308, 165, 166, 155, 429, 430, 428, 442, 304),
    # Calls that CAP_SYS_ADMIN would permit: swapon, swapoff, sethostname, setdomainname, quotactl,
    # quotactl_fd, fanotify_init, syslog, acct, add_key, request_key.
    *(167, 168, 170, 171, 179, 443, 300, 103, 163, 248, 249),
)


class Limits(msgspec.Struct, frozen=True):
    """The limits on a tool; sizes in bytes."""

    seconds: float = 600
    """Elapsed time, and CPU time too."""
    memory: int = 1 << 30
    """Address space (RLIMIT_AS)."""
    file_size: int = 0
    """Each file that it writes (RLIMIT_FSIZE)."""
    processes: int = 1
    """Processes, if it runs as a user of its own (RLIMIT_NPROC)."""
    files: int = 1024
    """Open files (RLIMIT_NOFILE). mkfs.erofs 1.8 keeps hundreds of files open for its threads."""
    output: int = 1 << 20
    """Standard output, if it is returned."""


class Task(msgspec.Struct, frozen=True):
    """A program to run, and everything that it may access."""

    argv: Sequence[str]
    rights: Mapping[int, int] = {}
    """Descriptor of a file or directory -> rights to reopen it as /proc/self/fd/N (landlock.py).

    A writable file belongs to the tool's user while the tool runs.
    """
    stdin: int | None = None
    """None for /dev/null."""
    stdout: int | None = None
    """None to return the output."""
    over: Mapping[int, Path] = {}
    """Open mount -> the directory that it replaces, for the tool only."""
    capabilities: int = 0
    """The capabilities that it keeps (capabilities(7))."""
    environment: Mapping[str, str] = {}
    kvm: bool = False
    """Whether it uses /dev/kvm, which must then also be in ``rights``."""
    limits: Limits = Limits()


class ToolResult(msgspec.Struct, frozen=True):
    """The exit code of a tool and its output."""

    code: int
    out: str
    err: str


def named(fd: int) -> str:
    """Return the path by which a tool can open a descriptor."""
    return f"/proc/self/fd/{fd}"


def run_tool(task: Task, *, fine: Sequence[int] = (0,)) -> ToolResult:
    """Run a confined program until it ends.

    Args:
        fine: the exit codes that mean success.

    Raises:
        CommandFailed: it failed, or exceeded a limit, which is then in ``limit``.
        MissingProgram: it is not installed.
        Incompatible: this host cannot confine it.
    """
    with running(task) as tool:
        return tool.finish(fine)


def run_on_file(
    argv: Sequence[str], file: int, *, fine: Sequence[int] = (0,), rights: int = WRITE
) -> ToolResult:
    """Run a confined program on one open file, whose path becomes the last argument.

    It can change no other file, and with ``rights`` `READ` not even that one. Raises like
    `run_tool`.
    """
    # File system tools check there whether the file is mounted.
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        limits = Limits(seconds=3600, memory=4 << 30, file_size=os.fstat(file).st_size)
        task = Task([*argv, named(file)], {file: rights, proc: READ}, limits=limits)
        return run_tool(task, fine=fine)
    finally:
        os.close(proc)


@contextmanager
def running(task: Task) -> Iterator[Tool]:
    """Run a confined program during the context, which ends it.

    `Tool.finish` reports its failure. Otherwise this raises like `run_tool`.
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
    """A running confined program."""

    def __init__(self, line: Sequence[str], task: Task, user: User | None) -> None:
        """Start the program; see `running`."""
        self._line, self._task, self._user = line, task, user
        self._deadline = time.monotonic() + task.limits.seconds
        self._out, self._err = bytearray(), bytearray()
        self._exceeded = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: BaseException | None = None
        self._start_attempted = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        with alone, ExitStack() as ends:
            self._rules = _ruleset(task)
            if self._rules:
                ends.callback(self._rules.close)
            ends.enter_context(inherited_only([*task.rights]))
            ends.enter_context(inherited_attributes())
            self._thread.start()
            self._start_attempted.wait()
        if self._failure:
            self._thread.join()
            raise self._failure

    def finish(self, fine: Sequence[int] = (0,)) -> ToolResult:
        """Wait for its end.

        Raises:
            CommandFailed: it failed or exceeded a limit.
        """
        self._thread.join()
        assert self._process  # noqa: S101 - for the type checker
        code = self._process.returncode
        err = self._err.decode(errors="replace")
        over = self._exceeded or _limit_reached(code, err)
        if over or code not in fine:
            output = f"{err}\n{self._out.decode(errors='replace')}".strip()
            limit = (over, _describe_limit(self._task.limits, over)) if over else None
            raise CommandFailed(shlex.join(self._line), code, output, limit=limit)
        return ToolResult(code, self._out.decode(errors="replace"), err)

    def end(self) -> None:
        """Kill it, and all processes that it has started, if it still runs."""
        if self._thread.is_alive():
            self._kill("")
            self._thread.join()

    def _work(self) -> None:
        """Start the tool and attend it until its end, in a thread that is confined like the tool.

        Credentials, filters and rulesets belong to a thread, and a child inherits those of the
        thread that creates it. When that thread ends, and so when this process ends, the tool ends.
        """
        try:
            self._confine()
            self._process, pipes = self._start()
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._start_attempted.set()
        try:
            self._attend(self._process.pid, pipes)
        finally:
            self._kill("")
            self._process.wait()
            for pipe in pipes:
                os.close(pipe)

    def _confine(self) -> None:
        try:
            unshare_directory()
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
                f"cannot confine {self._task.argv[0]} on this host: {error.strerror}",
                hint="run `onecopy doctor` to see what this host supports",
            ) from error

    def _start(self) -> tuple[subprocess.Popen[bytes], dict[int, bytearray]]:
        with ExitStack() as ends:
            null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            ends.callback(os.close, null)
            err_reader, err = os.pipe()
            ends.callback(os.close, err)
            pipes, out = {err_reader: self._err}, self._task.stdout
            if out is None:
                out_reader, out = os.pipe()
                ends.callback(os.close, out)
                pipes[out_reader] = self._out
            process = subprocess.Popen(
                [*_limiting_command(self._task.limits, own_user=bool(self._user)), *self._line],
                stdin=null if self._task.stdin is None else self._task.stdin,
                stdout=out,
                stderr=err,
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
                | dict(self._task.environment),
                # The inheritable descriptors are already set.
                close_fds=False,
                start_new_session=True,
            )
            return process, pipes

    def _attend(self, pid: int, pipes: Mapping[int, bytearray]) -> None:
        """Read its output until it ends or its time is up."""
        pidfd = os.pidfd_open(pid)
        with ExitStack() as ends, selectors.DefaultSelector() as selector:
            ends.callback(os.close, pidfd)
            for fd in (pidfd, *pipes):
                selector.register(fd, selectors.EVENT_READ)
            for fd in pipes:
                os.set_blocking(fd, False)
            ended = False
            while not ended and not self._exceeded:
                ready = selector.select(max(0, self._deadline - time.monotonic()))
                if not ready:
                    self._kill("time")
                # All output that was written before the end can be read after it.
                ended = any(key.fd == pidfd for key, _ in ready)
                for fd, kept in pipes.items():
                    if not self._read(fd, kept) and fd in selector.get_map():
                        selector.unregister(fd)

    def _read(self, fd: int, kept: bytearray) -> bool:
        """Read available data; return whether more can come."""
        with contextlib.suppress(BlockingIOError):
            # At most the capacity of a pipe, so that the deadline is checked in between.
            for _ in range(16):
                data = os.read(fd, 64 << 10)
                if not data:
                    return False
                keep(kept, data, _STDERR_LIMIT if kept is self._err else None)
                if kept is self._out and len(kept) > self._task.limits.output:
                    self._kill("output")
                    return False
        return True

    def _kill(self, over: str) -> None:
        self._exceeded = self._exceeded or over
        if self._process:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


def _is_regular(fd: int) -> bool:
    """Whether it is a regular file: devices and directories keep their owner."""
    return stat.S_ISREG(os.fstat(fd).st_mode)


def _ruleset(task: Task) -> Ruleset | None:
    """Build the Landlock rules of a task, to be closed; None on a kernel without Landlock."""
    version = landlock.abi()
    if not version:
        if task.capabilities:
            raise Incompatible(
                f"cannot confine {task.argv[0]}: this kernel has no Landlock",
                hint="add landlock to the kernel parameter lsm=",
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


def _limiting_command(limits: Limits, *, own_user: bool) -> list[str]:
    """Return the command that sets the limits and executes the one that follows."""
    options: dict[str, int | str] = {
        "as": limits.memory,
        "core": 0,
        # At the hard limit the kernel sends SIGKILL, which does not reveal the reason.
        "cpu": f"{math.ceil(limits.seconds)}:{math.ceil(limits.seconds) + 1}",
        "fsize": limits.file_size,
        "nofile": limits.files,
    }
    if own_user:
        # The thread that starts the tool counts too.
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


def _describe_limit(limits: Limits, over: str) -> str:
    sizes = {"memory": limits.memory, "file size": limits.file_size, "output": limits.output}
    return format_size(sizes[over]) if over in sizes else f"{limits.seconds:g} s"
