"""Starting QEMU, whose process outlives the command that started it.

Not here: what is on the command line (argv.py), what QEMU may (confine.py), what is said to it
afterwards (monitor.py).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from onecopy.errors import GuestFailed
from onecopy.linux import cgroup, child_reaper, vmm_registry
from onecopy.linux.process import stat, wait_for_end
from onecopy.linux.sandbox import seccomp
from onecopy.linux.vmm_registry import has_ended
from onecopy.model import Mergeable
from onecopy.vmm import closed_network, end_traces, logs, name_servers, vmm_limits
from onecopy.vmm.argv import PORTS, Hardware, Launch, command
from onecopy.vmm.confine import Confinement
from onecopy.vmm.open_notify import Answers
from onecopy.vmm.passed_files import given
from onecopy.vmm.spawn import Started, start
from onecopy.vmm.vmm_user import User, new_user, port_capabilities, why_not

#: Seconds from losing QEMU's connections to its end.
_ENDING = 0.2
#: Seconds that a killed QEMU gets; the kernel may take longer to give back what it had.
_KILLING = 10.0
_PRINTED = "the lines above are QEMU's and the guest's own; `onecopy doctor` checks this host"
_KILLED = (
    "QEMU was killed: if by the kernel, out of memory, `dmesg` tells; then start fewer guests, "
    "or give them less memory"
)


class Placing(threading.Thread):
    """Putting a VMM into a control group: beside its start, which that would take longer than."""

    def __init__(self, pid: int, memory: int, threads: int) -> None:
        """What it may have in use (vmm_limits.py)."""
        super().__init__(daemon=True)
        self._limits = pid, memory, threads
        self._group: Path | None = None

    def run(self) -> None:
        """Where there can be no such group, the limits on the process are all there are."""
        self._group = cgroup.create(*self._limits)

    def undo(self) -> None:
        """Remove the group of a VMM that has ended."""
        self.join()
        if self._group:
            cgroup.remove(self._group)


@dataclass(frozen=True)
class _Child:
    """What we hold of a QEMU process that we started."""

    process: subprocess.Popen[bytes]
    placing: Placing
    answers: Answers | None


class Vmm:
    """A QEMU process while we have to do with it, until kill() or detach()."""

    def __init__(
        self,
        pid: int,
        folder: Path,
        argv: Sequence[str],
        *,
        listener: int | None = None,
        child: _Child | None = None,
    ) -> None:
        """One that we started (``child``), or any other; raise ProcessLookupError."""
        self.pid = pid
        self._pidfd: int | None = os.pidfd_open(pid)
        self.start_ticks = stat(pid).start_ticks
        self.folder = folder
        self.argv = tuple(argv)
        self._process = child.process if child else None
        #: Number of QEMU's descriptor where its questions come in (open_notify.py).
        self.listener = listener
        self._answers = child.answers if child else None
        self._placing = child.placing if child else None

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait up to ``timeout`` seconds for the end; whether it has ended."""
        if self._pidfd is None:
            return True
        # Another task may be waiting, too.
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
        """The exit code once it has ended; None before, and of one that we did not start."""
        return self._process.poll() if self._process else None

    async def kill(self) -> None:
        """End the process, unasked.

        Nothing in it is awaited, so that nobody's cancellation comes between; it takes
        milliseconds.
        """
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            if has_ended(self._pidfd, _KILLING) and self._process:
                self._process.wait()
        self.detach()
        if self._placing:
            self._placing.undo()

    def detach(self) -> None:
        """Let the process live on without us; or let go of one that has just ended."""
        if self._process and self._process.poll() is None:
            # Popen would warn that it is still running.
            self._process.returncode = 0
            child_reaper.adopt(self.pid)
        if self._placing:
            self._placing.join()
        self._let_go()

    def _let_go(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if self._answers:
            self._answers.close()

    async def failed(self, error: GuestFailed) -> GuestFailed:
        """End the process; return ``error`` with what QEMU and the guest's console printed."""
        try:
            # What broke may be that it is just ending.
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


def printed(folder: Path) -> str:
    """What QEMU (qemu.log) and the guest (console.log) of a run folder printed."""
    texts = []
    with contextlib.suppress(OSError):
        texts.append(end_traces.read(logs.read(folder, logs.QEMU)).rest)
    with contextlib.suppress(OSError):
        texts.append(logs.read(folder, logs.CONSOLE))
    return "\n".join(text.strip() for text in texts if text.strip())


def prepare(folder: Path) -> None:
    """Make what QEMU opens in its run folder (argv.py names it): it can make nothing there."""
    for name, _ in PORTS:
        os.mkfifo(folder / f"{name}.in", 0o600)
        os.mkfifo(folder / f"{name}.out", 0o600)
    logs.make(folder)


def launch(hardware: Hardware, spec: Launch, *, inherit: Sequence[int] = ()) -> Vmm:
    """Start QEMU in its prepared run folder, confined (confine.py).

    ``spec.monitor_fd`` and ``console_fd`` are filled in here: the sockets are listening before QEMU
    runs, so that a client can connect at once and need not poll. ``inherit`` are descriptors that
    live as long as the VMM, which may open their files for reading. Some QEMUs are answered from
    the running event loop (open_notify.py). Raises Incompatible.
    """
    card = spec.card
    user = new_user(spec.accel, allow_host=card is not None and card.allow_host)
    if card and card.closed:
        closed_network.require(user, why_not(spec.accel))
    with contextlib.ExitStack() as stack:
        machine, named, files = stack.enter_context(given(hardware, spec, user, inherit))
        monitor = stack.enter_context(_listen(spec.folder / "monitor.sock"))
        console = stack.enter_context(_listen(spec.folder / "console.sock"))
        named = replace(named, monitor_fd=monitor, console_fd=console)
        asks = not spec.rom and seccomp.can_ask()
        inet = spec.card is not None and spec.card.tap is None
        confinement = Confinement(
            user=user,
            capabilities=port_capabilities(host for host, _ in spec.publish if inet),
            rights=files.rights,
            kvm=spec.accel == "kvm",
            asks=asks,
            merge=spec.ksm is Mergeable.ALL,
            inet=inet,
            etc=name_servers.stand_in(spec.folder.parent) if inet else None,
            binds=_ports(spec),
            limits=vmm_limits.of_vmm(hardware, spec, user),
        )
        log = stack.enter_context(_log(spec.folder))
        passed = (monitor, console, *files.passed)
        started = start(command(machine, named), confinement, spec.folder, log, passed)
        _on_record(started, spec.folder, user)
        answers = None
        if started.listener is not None:
            answers = Answers(files.asked)
            answers.serve(started.listener)
    process, argv = started.process, command(hardware, spec)
    placing = Placing(process.pid, vmm_limits.memory(hardware, spec), vmm_limits.threads(hardware))
    placing.start()
    child = _Child(process, placing, answers)
    return Vmm(process.pid, spec.folder, argv, listener=started.listener, child=child)


def _ports(spec: Launch) -> tuple[int, ...] | None:
    """Where it may listen: user-mode networks also do at ports that the kernel chooses."""
    return None if spec.ports_later else tuple({0, *(host for host, _ in spec.publish)})


def _on_record(started: Started, folder: Path, user: User | None) -> None:
    """Have a VMM known whatever becomes of us, before its guest runs; or end it again."""
    process = started.process
    try:
        vmm_registry.register(
            folder, vmm_registry.Process(process.pid, stat(process.pid).start_ticks), _id(user)
        )
    except BaseException:
        process.kill()
        process.wait()
        if started.listener is not None:
            os.close(started.listener)
        raise


def _id(user: User | None) -> int:
    return user.id if user else os.geteuid()


@contextlib.contextmanager
def _listen(path: Path) -> Iterator[int]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        # What bind() makes gets these rights: ours alone.
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
