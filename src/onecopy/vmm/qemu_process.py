"""Start QEMU, whose process outlives the command that starts it.

Not here: the command line (argv.py), QEMU's confinement (confine.py), and talking to QEMU
(monitor.py).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from onecopy.errors import GuestFailed
from onecopy.linux import cgroup, vmm_registry
from onecopy.linux.process import stat, wait_for_end
from onecopy.linux.sandbox import seccomp
from onecopy.linux.vmm_registry import has_ended
from onecopy.model import Mergeable
from onecopy.vmm import closed_network, logs, name_servers, sockets, vmm_limits
from onecopy.vmm.argv import PORTS, Hardware, Launch, command
from onecopy.vmm.confine import Confinement
from onecopy.vmm.fork_request import Forked
from onecopy.vmm.fork_server import ForkServer
from onecopy.vmm.open_notify import Answers
from onecopy.vmm.passed_files import pass_files
from onecopy.vmm.spawn import Process, Started, release, start
from onecopy.vmm.vmm_user import User, new_user, port_capabilities, why_not

#: Seconds from the loss of QEMU's connections to its end.
_ENDING = 0.2
#: Seconds for a killed QEMU to end: the kernel may take time to free its memory.
_KILLING = 10.0
_PRINTED = "the lines above are from QEMU and the guest; `onecopy doctor` checks this host"
_KILLED = (
    "QEMU was killed: if the kernel did that for lack of memory, `dmesg` shows it; then start "
    "fewer guests, or give them less memory"
)


class GroupSetup(threading.Thread):
    """A thread that puts a VMM into a control group, which takes longer than the VMM's start."""

    def __init__(self, pid: int, memory: int, threads: int) -> None:
        """Set the limits on what the VMM may use (vmm_limits.py)."""
        super().__init__(daemon=True)
        self._limits = pid, memory, threads
        self._group: Path | None = None

    def run(self) -> None:
        """Create the group; without one, only the limits on the process apply."""
        self._group = cgroup.create(*self._limits)

    def undo(self) -> None:
        """Remove the group of a VMM that has ended."""
        self.join()
        if self._group:
            cgroup.remove(self._group)


class _Child(msgspec.Struct, frozen=True):
    """The resources of a QEMU process that this process started."""

    process: Process
    group_setup: GroupSetup
    answers: Answers | None
    why_exec: str


class Vmm:
    """A QEMU process that this process manages, until kill() or detach()."""

    def __init__(
        self,
        pid: int,
        folder: Path,
        argv: Sequence[str],
        *,
        listener: int | None = None,
        child: _Child | None = None,
    ) -> None:
        """Manage a process started here (``child``) or any other; raise ProcessLookupError."""
        self.pid = pid
        self._pidfd = _open_pidfd(child.process) if child else os.pidfd_open(pid)
        self.start_ticks = (_identity(child.process) if child else _of_pid(pid)).start_ticks
        self.folder = folder
        self.argv = tuple(argv)
        self._process = child.process if child else None
        #: Whether a fork server started it, and why none did although one was to.
        self.forked = isinstance(self._process, Forked)
        self.why_exec = child.why_exec if child else ""
        #: QEMU's descriptor of the listener for its open requests (open_notify.py).
        self.listener = listener
        self._answers = child.answers if child else None
        self._group_setup = child.group_setup if child else None

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait up to ``timeout`` seconds for the end; return whether it has ended."""
        if self._pidfd is None:
            return True
        # A copy, because another task may be waiting too.
        pidfd = os.dup(self._pidfd)
        try:
            ended = await wait_for_end(pidfd, timeout)
        finally:
            os.close(pidfd)
        if ended and self._process:
            self._process.wait()
        return ended

    @property
    def returncode(self) -> int | None:
        """The exit code after its end; None before, or if another process started it."""
        return self._process.poll() if self._process else None

    async def kill(self) -> None:
        """Kill the process.

        This takes milliseconds and awaits nothing, so that no cancellation can interrupt it.
        """
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            if has_ended(self._pidfd, _KILLING) and self._process:
                self._process.wait()
        self.detach()
        if self._group_setup:
            self._group_setup.undo()

    def detach(self) -> None:
        """Let the process continue without this one, or release a process that has just ended."""
        if self._process:
            release(self._process)
        if self._group_setup:
            self._group_setup.join()
        self._release()

    def _release(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if self._answers:
            self._answers.close()

    async def failed(self, error: GuestFailed) -> GuestFailed:
        """Kill the process; return ``error`` with the output of QEMU and of the guest's console."""
        try:
            # The error may be a consequence of its end.
            await self.wait(_ENDING)
        finally:
            returncode = self.returncode
            await self.kill()
        hint = _KILLED if returncode == -signal.SIGKILL else error.hint or _PRINTED
        return GuestFailed(
            error.message,
            command=shlex.join(self.argv),
            returncode=returncode,
            output=printed(self.folder),
            hint=hint,
        )


def _open_pidfd(process: Process) -> int | None:
    """Return a pidfd of a process that this one has started, also if it has ended."""
    return process.open_pidfd() if isinstance(process, Forked) else os.pidfd_open(process.pid)


def _identity(process: Process) -> vmm_registry.Process:
    return process.identity if isinstance(process, Forked) else _of_pid(process.pid)


def _of_pid(pid: int) -> vmm_registry.Process:
    return vmm_registry.Process(pid, stat(pid).start_ticks)


def printed(folder: Path) -> str:
    """Return the output of QEMU (qemu.log) and of the guest (console.log) in a run directory."""
    texts = []
    with contextlib.suppress(OSError):
        from onecopy.vmm import end_traces  # few starts fail

        texts.append(end_traces.read(logs.read(folder, logs.QEMU)).rest)
    with contextlib.suppress(OSError):
        texts.append(logs.read(folder, logs.CONSOLE))
    return "\n".join(text.strip() for text in texts if text.strip())


def prepare(folder: Path) -> None:
    """Create the files that QEMU opens in its run directory, where it may not create any."""
    for name, _ in PORTS:
        os.mkfifo(folder / f"{name}.in", 0o600)
        os.mkfifo(folder / f"{name}.out", 0o600)
    logs.make(folder)


def launch(
    hardware: Hardware,
    spec: Launch,
    *,
    inherit: Sequence[int] = (),
    server: ForkServer | None = None,
) -> Vmm:
    """Start a confined QEMU (confine.py) in its prepared run directory.

    The sockets of ``spec.monitor_fd`` and ``console_fd``, which are set here, listen before QEMU
    runs. The running event loop answers open requests of some QEMUs (open_notify.py).

    Args:
        inherit: descriptors that live as long as the VMM, which may read their files.
        server: the server that forks the VMM if it can; None starts it by exec.

    Raises:
        Incompatible: this host cannot confine QEMU or close its guest.
    """
    card = spec.card
    user = new_user(spec.accel, allow_host=card is not None and card.allow_host)
    if card and card.closed:
        closed_network.require(user, why_not(spec.accel))
    with contextlib.ExitStack() as stack:
        machine, named, files = stack.enter_context(pass_files(hardware, spec, user, inherit))
        monitor = stack.enter_context(_listen(spec.folder / sockets.MONITOR))
        console = stack.enter_context(_listen(spec.folder / sockets.CONSOLE))
        named = replace(named, monitor_fd=monitor, console_fd=console)
        confinement = _confinement(hardware, spec, user, files.rights)
        log = stack.enter_context(_log(spec.folder))
        passed = (monitor, console, *files.passed)
        started = start(command(machine, named), confinement, spec.folder, log, passed, server)
        _register(started, spec.folder, user)
        answers = None
        if started.listener is not None:
            answers = Answers(files.open_requests)
            answers.serve(started.listener)
    process, argv = started.process, command(hardware, spec)
    group_setup = GroupSetup(
        process.pid, vmm_limits.memory(hardware, spec), vmm_limits.threads(hardware)
    )
    group_setup.start()
    child = _Child(process, group_setup, answers, started.why_exec)
    return Vmm(process.pid, spec.folder, argv, listener=started.number, child=child)


def _confinement(
    hardware: Hardware, spec: Launch, user: User | None, rights: Mapping[int, int]
) -> Confinement:
    inet = spec.card is not None and spec.card.tap is None
    return Confinement(
        user=user,
        capabilities=port_capabilities(host for host, _ in spec.publish if inet),
        rights=rights,
        kvm=spec.accel == "kvm",
        asks=not spec.rom and seccomp.can_ask(),
        merge=spec.ksm is Mergeable.ALL,
        inet=inet,
        etc=name_servers.stand_in(spec.folder.parent) if inet else None,
        binds=_ports(spec),
        limits=vmm_limits.of_vmm(hardware, spec, user),
    )


def _ports(spec: Launch) -> tuple[int, ...] | None:
    """Return the ports on which it may listen; user-mode networks also use random ones (0)."""
    return None if spec.ports_later else tuple({0, *(host for host, _ in spec.publish)})


def _register(started: Started, folder: Path, user: User | None) -> None:
    """Register a VMM before its guest runs, so that it is known if this process dies; or end it."""
    process = started.process
    try:
        vmm_registry.register(folder, _identity(process), _user_id(user))
    except BaseException:
        process.kill()
        process.wait()
        if started.listener is not None:
            os.close(started.listener)
        raise


def _user_id(user: User | None) -> int:
    return user.id if user else os.geteuid()


@contextlib.contextmanager
def _listen(path: Path) -> Iterator[int]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        # bind() creates the socket with this mode: access for its owner only.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        listener.listen()
        yield listener.fileno()


@contextlib.contextmanager
def _log(folder: Path) -> Iterator[int]:
    fd = os.open(folder / logs.QEMU, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
