"""Runs a program in a guest, with its standard streams.

QEMU's guest agent starts the program and reports its exit code. The agent returns output only at
the end, and cuts it at 16 MiB. Therefore each program gets virtio ports of its own for its streams:
raw bytes, with the back-pressure of a pipe (docs/architecture.md, "exec"). Not here: the ports
(exec_ports.py), sources and sinks (exec_streams.py).
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

#: Seconds for the agent to answer while a program runs. The agent may be slow under load, and the
#: question is only whether the program was killed.
_PATIENCE = 300.0
#: Seconds for a program to exit after the end of its output.
_ENDING = 60.0
#: Exit code of a program that exceeded its time limit, as for timeout(1).
TIMED_OUT = 124

_BUSYBOX = f"{TOOLS_MOUNTPOINT}/bin/busybox"
#: BUSYBOX TAG: kills the session of the wrapper with that tag, whose pid is unknown. Words of a
#: command line end with zero bytes, which the shell's read drops.
_KILL = """\
for at in /proc/[0-9]*; do
    line=
    read -r line <"$at/cmdline"
    case $line in
        *"/exec$1"*) kill -9 "-${at#/proc/}" ;;
    esac
done 2>/dev/null"""


class _Started(msgspec.Struct, frozen=True):
    """The answer of guest-exec."""

    pid: Annotated[int, msgspec.Meta(ge=1, le=1 << 22)]


class _Status(msgspec.Struct, frozen=True):
    """The answer of guest-exec-status."""

    exited: bool
    exitcode: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None
    signal: Annotated[int, msgspec.Meta(ge=1, le=64)] | None = None


class Completed(msgspec.Struct, frozen=True):
    """A program that ended in a guest."""

    exit_code: int
    """128 + n if signal n killed it, 127 if it does not exist, 124 if its time limit expired."""
    stdout: bytes = b""
    stderr: bytes = b""

    @property
    def text(self) -> str:
        """Standard output as text; invalid UTF-8 is replaced."""
        return self.stdout.decode(errors="replace")


async def run_captured(
    folder: Path,
    argv: Sequence[str],
    *,
    stdin: bytes | None = None,
    timeout: float | None = None,
    limit: int = SAID,
) -> Completed:
    """Run a program and capture its output, and the end of its error output.

    Args:
        folder: The guest's run directory.
        argv: The program and its arguments.
        stdin: The input; None for an empty one.
        timeout: Time limit in seconds; None for none.
        limit: The most bytes of output.

    Raises:
        TooLarge: The program printed more than ``limit`` bytes.
        OnecopyError: Any error of `run_streaming`.
    """
    out, err = Kept(limit), Tail()
    code = await run_streaming(folder, argv, Streams(out, err, stdin), timeout=timeout)
    return Completed(code, bytes(out), bytes(err))


async def run_streaming(
    folder: Path, argv: Sequence[str], streams: Streams, *, timeout: float | None = None
) -> int:
    """Run a program in a guest, and pass its streams on as they come.

    Args:
        folder: The guest's run directory.
        argv: The program and its arguments.
        streams: The source and the sinks.
        timeout: Time limit in seconds; None for none. When it expires, the program's session is
            killed.

    Returns:
        The exit code; 124 if the time limit expired.

    Raises:
        AgentFailed: The agent failed or did not answer, or the kill could not be confirmed.
        NoSlot: No port became free in time.
        GuestFailed: The guest ended.
    """
    deadline, program = Deadline.after(timeout), _Program(folder, argv, streams)
    scope = deadline.scope()
    try:
        ports = plugged(folder, program.tag, program.stdin, deadline, program.end)
        async with scope, ports as plugged_in:
            await program.run(plugged_in)
    except TimeoutError:
        if not scope.expired():  # a sink raised it
            raise
    return program.outcome(timeout or 0)


class _Program:
    """A program, from its start to its end."""

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
        """Start the program, move its streams, and wait for its exit code."""
        self._begun = True
        self._pid = await self._spawn()
        await _transfer(ports, self.tag, self._streams, self._agent, self._pid)
        self._code = await _exit_code(self._agent, self._pid)

    async def end(self) -> None:
        """Kill the program if it may still run; ignore errors, for example of an ended guest."""
        if self._begun and self._code is None:
            with contextlib.suppress(OnecopyError):
                await self._kill()
                self._killed = True

    def outcome(self, timeout: float) -> int:
        """Return the exit code; raise AgentFailed if the time expired and the kill failed."""
        if self._code is not None:
            return self._code
        if self._killed:
            return TIMED_OUT
        known = "the program may still run" if self._begun else "the program was not started"
        raise AgentFailed(
            f"{self._folder.name} did not answer within {timeout:g} s, the time limit of "
            f"{shown(self._argv[0])}: {known}",
            hint=f"see `onecopy logs {self._folder.name}`, or end the guest with `onecopy stop`",
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
    raise AgentFailed(
        f"the guest agent did not report the exit code of process {pid} within {_ENDING:g} s"
    )


async def _status(agent: Agent, pid: int) -> _Status:
    try:
        return await agent.call("guest-exec-status", _Status, pid=pid)
    except AgentFailed as error:
        # QEMU's qga/commands.c: the agent has no such child.
        if "Invalid parameter 'pid'" not in error.message:
            raise
        raise AgentFailed(
            "the guest agent restarted while the program ran, so its exit code is lost",
            hint="run the program again",
        ) from error


async def _transfer(ports: Ports, tag: str, streams: Streams, agent: Agent, pid: int) -> None:
    """Move all streams until both outputs end, or the wrapper is gone."""
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
            # A killed wrapper cannot write the end mark. Take the data that is still on its way.
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
    """Return when the program has ended; raise AgentFailed when the agent does not answer."""
    pause = 1.0
    while True:
        await asyncio.sleep(pause)
        # Poll less often over time, because other commands need the agent, too.
        pause = min(pause * 1.5, 10.0)
        # The agent reports the status of an ended program only once. Look for the process instead.
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
    """Pass on data until the end mark ``end``, which may arrive in pieces."""
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
    """Return the length of the longest suffix of ``data`` that is a prefix of ``end``."""
    return next((n for n in range(len(end) - 1, 0, -1) if data.endswith(end[:n])), 0)


async def _feed(port: socket.socket | None, source: asyncio.StreamReader | bytes | None) -> None:
    if port is None or source is None:
        return
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionError):  # the program did not read all of its input
        if isinstance(source, bytes):
            await loop.sock_sendall(port, source)
        else:
            while data := await source.read(1 << 16):
                await loop.sock_sendall(port, data)
                await asyncio.sleep(0)
        # Not close(): then QEMU would drop the data that it has not read yet.
        port.shutdown(socket.SHUT_WR)
