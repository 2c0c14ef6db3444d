"""Starting QEMU, whose process outlives the command that started it.

Not here: what is on the command line (argv.py), what is said to QEMU afterwards (monitor.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from onecopy.errors import GuestFailed
from onecopy.run import environment
from onecopy.vmm.argv import PORTS, Hardware, Launch, command

_PR_SET_THP_DISABLE = 41


class Vmm:
    """A QEMU process that we started; ``pid`` stays ours until wait() or detach()."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, argv: Sequence[str]) -> None:
        self.pid = process.pid
        self.folder = folder
        self.argv = tuple(argv)
        self._process = process

    async def wait(self, timeout: float | None = None) -> int | None:
        """Wait up to ``timeout`` seconds for the end; return the exit code or None."""
        if self._process.poll() is not None:
            return self._process.returncode
        pidfd = os.pidfd_open(self.pid)
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, ended.set)
        try:
            async with asyncio.timeout(timeout):
                await ended.wait()
        except TimeoutError:
            return None
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        return self._process.wait()

    async def kill(self) -> None:
        """End the process, unasked."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        await self.wait()

    def detach(self) -> None:
        """Let the process live on without us."""
        # Popen would warn that it is still running; init reaps it once we are gone.
        self._process.returncode = 0

    def explain(self, error: GuestFailed) -> GuestFailed:
        """``error`` with what QEMU and the guest's console printed."""
        return GuestFailed(
            error.message,
            command=shlex.join(self.argv),
            returncode=self._process.poll(),
            output=printed(self.folder),
            hint=error.hint
            or "the lines above are QEMU's and the guest's own; `onecopy doctor` checks this host",
        )


def printed(folder: Path) -> str:
    """What QEMU (qemu.log) and the guest (console.log) of a run folder printed."""
    texts = []
    for name in ("qemu.log", "console.log"):
        with contextlib.suppress(OSError):
            texts.append((folder / name).read_text(errors="replace"))
    return "\n".join(text.strip() for text in texts if text.strip())


def prepare(folder: Path) -> None:
    """Make the pipes of a run folder (argv.py names them)."""
    for name, _ in PORTS:
        os.mkfifo(folder / f"{name}.in", 0o600)
        os.mkfifo(folder / f"{name}.out", 0o600)


def launch(hardware: Hardware, spec: Launch, *, inherit: Sequence[int] = ()) -> Vmm:
    """Start QEMU in its prepared run folder.

    ``spec.monitor_fd`` is filled in here: the socket is listening before QEMU runs, so that a
    client can connect at once and need not poll. ``inherit`` are descriptors that live as long as
    the VMM: its lease, and its saved state.
    """
    with _listen(spec.folder / "monitor.sock") as monitor, _log(spec.folder) as log:
        argv = command(hardware, replace(spec, monitor_fd=monitor.fileno()))
        with _small_pages():
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=spec.folder,
                env=environment(),
                pass_fds=(monitor.fileno(), *inherit),
                start_new_session=True,
            )
    return Vmm(process, spec.folder, argv)


@contextlib.contextmanager
def _listen(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        yield listener


@contextlib.contextmanager
def _log(folder: Path) -> Iterator[int]:
    fd = os.open(folder / "qemu.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _small_pages() -> Iterator[None]:
    """Let children inherit "no transparent huge pages" (prctl(2), PR_SET_THP_DISABLE).

    QEMU asks for huge pages for guest RAM and for its translation buffer: a small guest would
    then occupy memory that it never touches.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    before = libc.prctl(42, 0, 0, 0, 0)  # PR_GET_THP_DISABLE
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_THP_DISABLE, max(before, 0), 0, 0, 0)
