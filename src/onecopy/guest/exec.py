"""Running a program in a guest, with its streams.

QEMU's guest agent starts it and tells its exit code. The agent itself keeps output back until the
end and cuts it at 16 MiB, so the streams take virtio ports plugged in for the one program: raw
bytes, with the back-pressure of a pipe, that vanish with it (docs/architecture.md, "exec").
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from onecopy.deadline import Deadline
from onecopy.errors import AgentFailed, GuestFailed, OnecopyError
from onecopy.guest.exec_ports import HURRY, Ports, plugged
from onecopy.guest.exec_streams import SAID, Kept, Sink, Streams, Tail, give
from onecopy.images.initramfs import TOOLS_MOUNTPOINT
from onecopy.vmm.agent import Agent
from onecopy.vmm.guest_reply import Nothing, shown

#: Seconds an agent may say nothing while a program runs: other guests or the program itself may let
#: it wait, and only that the program has ended without a word is asked.
_PATIENCE = 300.0
#: Seconds after the end of a program's output within which it ends.
_ENDING = 60.0
#: Exit code that a program gets whose time was up, as timeout(1) has it.
TIMED_OUT = 124

_BUSYBOX = f"{TOOLS_MOUNTPOINT}/bin/busybox"
#: BUSYBOX TAG: ends the wrapper of that tag, and all in its session, of which we have not heard.
#: Of a command line, whose words end in zeros, the shell reads all but the zeros.
_KILL = """\
for at in /proc/[0-9]*; do
    line=
    read -r line <"$at/cmdline"
    case $line in
        *"/exec$1"*) kill -9 "-${at#/proc/}" ;;
    esac
done 2>/dev/null"""


class _Started(msgspec.Struct, frozen=True):
    """guest-exec: a process id of Linux."""

    pid: Annotated[int, msgspec.Meta(ge=1, le=1 << 22)]


class _Status(msgspec.Struct, frozen=True):
    """guest-exec-status."""

    exited: bool
    exitcode: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None
    signal: Annotated[int, msgspec.Meta(ge=1, le=64)] | None = None


class Completed(msgspec.Struct, frozen=True):
    """A program that ended in a guest."""

    exit_code: int
    """128 + n if signal n ended it, 127 if there is no such program, 124 if its time was up."""
    stdout: bytes = b""
    stderr: bytes = b""

    @property
    def text(self) -> str:
        """What it printed on standard output, as text."""
        return self.stdout.decode(errors="replace")


async def run_captured(
    folder: Path,
    argv: Sequence[str],
    *,
    stdin: bytes | None = None,
    timeout: float | None = None,
    limit: int = SAID,
) -> Completed:
    """Run a program and keep what it prints, of its errors the end.

    Raises TooLarge if it prints more than ``limit`` bytes; and as `run_streaming`.
    """
    out, err = Kept(limit), Tail()
    code = await run_streaming(folder, argv, Streams(out, err, stdin), timeout=timeout)
    return Completed(code, bytes(out), bytes(err))


async def run_streaming(
    folder: Path, argv: Sequence[str], streams: Streams, *, timeout: float | None = None
) -> int:
    """Run a program in the guest of a run folder and return its exit code.

    ``timeout`` is in seconds; when it is up the program and all in its session are killed and 124
    is returned. Raises AgentFailed when the agent does not answer, or not as it should, and then
    also when nobody can tell that the program was killed; NoSlot when it waited in vain for other
    programs to end; GuestFailed when the guest ends.
    """
    deadline, program = Deadline.after(timeout), _Program(folder, argv, streams)
    scope = deadline.scope()
    try:
        ports = plugged(folder, program.tag, program.stdin, deadline, program.end)
        async with scope, ports as plugged_in:
            await program.run(plugged_in)
    except TimeoutError:
        if not scope.expired():  # then it is one of whoever takes the output
            raise
    return program.outcome(timeout or 0)


class _Program:
    """One program, from its start to its end."""

    def __init__(self, folder: Path, argv: Sequence[str], streams: Streams) -> None:
        self.tag = secrets.token_hex(8)
        self.stdin = streams.stdin is not None
        self._folder = folder
        self._begun = self._killed = False
        self._code: int | None = None
        self._agent = Agent(folder)
        self._argv = argv
        self._streams = streams
        self._pid: int | None = None

    async def run(self, ports: Ports) -> None:
        """Run it; whatever ends that leaves it to `end`."""
        self._begun = True
        self._pid = await self._spawn()
        await _transfer(ports, self.tag, self._streams, self._agent, self._pid)
        self._code = await _exit_code(self._agent, self._pid)

    async def end(self) -> None:
        """Kill it if it may still run, in vain if the guest has ended."""
        if self._begun and self._code is None:
            with contextlib.suppress(OnecopyError):
                await self._kill()
                self._killed = True

    def outcome(self, timeout: float) -> int:
        """Its exit code; raise AgentFailed if nobody knows what it did when its time was up."""
        if self._code is not None:
            return self._code
        if self._killed:
            return TIMED_OUT
        known = "it may still run" if self._begun else "it was not started"
        raise AgentFailed(
            f"{self._folder.name} did not answer within {timeout:g} s, the time of "
            f"{shown(self._argv[0])}: {known}",
            hint="`onecopy logs` shows its console; `onecopy stop` ends it all the same",
        )

    async def _spawn(self) -> int:
        words = [f"{TOOLS_MOUNTPOINT}/exec", self.tag, "1" if self.stdin else "0", *self._argv]
        started = await self._agent.call(
            "guest-exec", _Started, path=_BUSYBOX, arg=["setsid", "sh", *words]
        )
        return started.pid

    async def _kill(self) -> None:
        known = ["kill", "-9", f"-{self._pid}"]
        argv = known if self._pid else ["sh", "-c", _KILL, _BUSYBOX, self.tag]
        await self._agent.call("guest-exec", _Started, timeout=HURRY, path=_BUSYBOX, arg=argv)


async def _exit_code(agent: Agent, pid: int) -> int:
    delay, deadline = 0.002, Deadline.after(_ENDING)
    while deadline.left():
        status = await _status(agent, pid)
        if status.exited:
            if status.exitcode is None:
                return 128 + (status.signal or 0)
            return status.exitcode
        await asyncio.sleep(delay)
        delay = min(delay * 2, 0.1)
    raise AgentFailed(f"the exit code of process {pid} did not come within {_ENDING:g} s")


async def _status(agent: Agent, pid: int) -> _Status:
    try:
        return await agent.call("guest-exec-status", _Status, pid=pid)
    except AgentFailed as error:
        # QEMU's qga/commands.c: it has no such child.
        if "Invalid parameter 'pid'" not in error.message:
            raise
        raise AgentFailed(
            "the guest agent was restarted while the program ran, whose exit code is lost",
            hint="run the program again",
        ) from error


async def _transfer(ports: Ports, tag: str, streams: Streams, agent: Agent, pid: int) -> None:
    """Move all streams until both outputs are at their end, or the wrapper is gone."""
    feed = asyncio.ensure_future(_feed(ports.get("in"), streams.stdin))
    feed.add_done_callback(lambda _: _failed(feed) and outputs.cancel())
    drains = [
        asyncio.ensure_future(_drain(ports["out"], tag.encode(), streams.stdout)),
        asyncio.ensure_future(_drain(ports["err"], tag.encode(), streams.stderr)),
    ]
    outputs = asyncio.gather(*drains)
    watch = asyncio.ensure_future(_watch(agent, pid))
    try:
        tasks: set[asyncio.Future[Any]] = {outputs, watch}
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if _failed(feed):
            feed.result()
        if not outputs.done():
            # The wrapper was killed and can write no end: take what is still on its way.
            await asyncio.wait({outputs}, timeout=1)
        if outputs.done():
            outputs.result()
        elif watch.done():
            watch.result()
    finally:
        for task in (feed, *drains, watch):
            task.cancel()
        await asyncio.gather(feed, *drains, outputs, watch, return_exceptions=True)


def _failed(task: asyncio.Future[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None


async def _watch(agent: Agent, pid: int) -> None:
    """Return when the program has ended; raise AgentFailed when the guest does not tell."""
    pause = 1.0
    while True:
        await asyncio.sleep(pause)
        # Others have something to ask, too.
        pause = min(pause * 1.5, 10.0)
        # The status of an ended program can be asked for once only: look for the process instead.
        try:
            handle = await agent.call(
                "guest-file-open", int, timeout=_PATIENCE, path=f"/proc/{pid}/stat", mode="r"
            )
        except AgentFailed as error:
            if "No such file" in error.message:
                return
            raise
        await agent.call("guest-file-close", Nothing, handle=handle)


async def _drain(port: socket.socket, end: bytes, sink: Sink) -> None:
    """Pass on what comes, until ``end``, which may arrive in pieces."""
    loop = asyncio.get_running_loop()
    held = b""
    while True:
        data = await loop.sock_recv(port, 1 << 16)
        if not data:
            raise GuestFailed("the guest ended while a program ran in it")
        held += data
        if held.endswith(end):
            await give(sink, held[: -len(end)])
            return
        keep = _overlap(held, end)
        await give(sink, held[: len(held) - keep])
        held = held[len(held) - keep :]


def _overlap(data: bytes, end: bytes) -> int:
    """How many last bytes of ``data`` may be the beginning of ``end``."""
    return next((n for n in range(len(end) - 1, 0, -1) if data.endswith(end[:n])), 0)


async def _feed(port: socket.socket | None, source: asyncio.StreamReader | bytes | None) -> None:
    if port is None or source is None:
        return
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionError):  # the program does not read all of its input
        if isinstance(source, bytes):
            await loop.sock_sendall(port, source)
        else:
            while data := await source.read(1 << 16):
                await loop.sock_sendall(port, data)
                await asyncio.sleep(0)
        # Not close(): QEMU drops what it has not read yet when its peer hangs up.
        port.shutdown(socket.SHUT_WR)
