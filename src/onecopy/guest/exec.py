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
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from onecopy.build.bootfiles import TOOLS_MOUNTPOINT
from onecopy.errors import AgentFailed, GuestFailed, OnecopyError
from onecopy.host.lock import is_held, locked
from onecopy.vmm.agent import Agent
from onecopy.vmm.hotplug import EXEC_PORT
from onecopy.vmm.monitor import Monitor, connect

#: Seconds an agent may say nothing while a program runs: other guests or the program itself may let
#: it wait, and only that the program has ended without a word is asked.
_PATIENCE = 300.0
#: Exit code that a program gets whose time was up, as timeout(1) has it.
TIMED_OUT = 124

Sink = Callable[[bytes], object]


class Streams(msgspec.Struct, frozen=True):
    """Where a program's streams go; ``stdin`` None means an empty one.

    What reading one or writing the others raises ends the program.
    """

    stdout: Sink
    stderr: Sink
    stdin: asyncio.StreamReader | bytes | None = None


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
    folder: Path, argv: Sequence[str], *, stdin: bytes | None = None, timeout: float | None = None
) -> Completed:
    """Run a program and keep all that it prints."""
    out, err = bytearray(), bytearray()
    streams = Streams(out.extend, err.extend, stdin)
    code = await run_streaming(folder, argv, streams, timeout=timeout)
    return Completed(code, bytes(out), bytes(err))


async def run_streaming(
    folder: Path, argv: Sequence[str], streams: Streams, *, timeout: float | None = None
) -> int:
    """Run a program in the guest of a run folder and return its exit code.

    ``timeout`` is in seconds; when it is up the program and all in its session are killed and 124
    is returned. Raises AgentFailed when the agent does not answer, GuestFailed when the guest ends.
    """
    agent = Agent(folder)
    tag = secrets.token_hex(8)
    async with _ports(folder, tag, streams.stdin is not None) as ports:
        pid = await _spawn(agent, tag, streams.stdin is not None, argv)
        try:
            async with asyncio.timeout(timeout):
                await _transfer(ports, tag, streams, agent, pid)
                return await _exit_code(agent, pid)
        except TimeoutError:
            await _kill(agent, pid)
            return TIMED_OUT
        except (AgentFailed, GuestFailed):
            raise
        except BaseException:
            with contextlib.suppress(OnecopyError):
                await _kill(agent, pid)
            raise


async def _spawn(agent: Agent, tag: str, stdin: bool, argv: Sequence[str]) -> int:
    wrapper = ["setsid", "sh", f"{TOOLS_MOUNTPOINT}/exec", tag, "1" if stdin else "0"]
    reply = await agent.call(
        "guest-exec", path=f"{TOOLS_MOUNTPOINT}/bin/busybox", arg=[*wrapper, *argv]
    )
    return int(reply["pid"])


async def _kill(agent: Agent, pid: int) -> None:
    argv = ["kill", "-9", f"-{pid}"]
    await agent.call("guest-exec", path=f"{TOOLS_MOUNTPOINT}/bin/busybox", arg=argv)


async def _exit_code(agent: Agent, pid: int) -> int:
    delay = 0.002
    while True:
        status = await agent.call("guest-exec-status", pid=pid)
        if status["exited"]:
            return int(status.get("exitcode", 128 + status.get("signal", 0)))
        await asyncio.sleep(delay)
        delay = min(delay * 2, 0.1)


async def _transfer(
    ports: dict[str, socket.socket], tag: str, streams: Streams, agent: Agent, pid: int
) -> None:
    """Move all streams until both outputs are at their end, or the wrapper is gone."""
    feed = asyncio.ensure_future(_feed(ports.get("in"), streams.stdin))
    feed.add_done_callback(lambda _: _failed(feed) and outputs.cancel())
    outputs = asyncio.gather(
        _drain(ports["out"], tag.encode(), streams.stdout),
        _drain(ports["err"], tag.encode(), streams.stderr),
    )
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
        for task in (feed, outputs, watch):
            task.cancel()
        await asyncio.gather(feed, outputs, watch, return_exceptions=True)


def _failed(task: asyncio.Future[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None


async def _watch(agent: Agent, pid: int) -> None:
    """Return when the program has ended; raise AgentFailed when the guest has."""
    while True:
        await asyncio.sleep(1)
        # The status of an ended program can be asked for once only: look for the process instead.
        try:
            handle = await agent.call(
                "guest-file-open", timeout=_PATIENCE, path=f"/proc/{pid}/stat", mode="r"
            )
        except AgentFailed as error:
            if "No such file" in error.message:
                return
            raise
        await agent.call("guest-file-close", handle=handle)


async def _drain(port: socket.socket, end: bytes, sink: Sink) -> None:
    """Pass on what comes, until ``end``, which may arrive in pieces."""
    loop = asyncio.get_running_loop()
    held = b""
    while True:
        data = await loop.sock_recv(port, 1 << 16)
        if not data:
            raise GuestFailed("the guest ended while a program ran in it", output=held.decode())
        held += data
        if held.endswith(end):
            sink(held[: -len(end)])
            return
        keep = _overlap(held, end)
        sink(held[: len(held) - keep])
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
        # Not close(): QEMU drops what it has not read yet when its peer hangs up.
        port.shutdown(socket.SHUT_WR)


@contextlib.asynccontextmanager
async def _ports(folder: Path, tag: str, stdin: bool) -> AsyncIterator[dict[str, socket.socket]]:
    """Plug in one virtio port for each stream, and take them out again.

    Meanwhile the file of this tag is locked: that tells its ports from those of a killed command.
    """
    names = (["in"] if stdin else []) + ["out", "err"]
    ours: dict[str, socket.socket] = {}
    mark = folder / f"exec.{tag}"
    async with locked(mark):
        try:
            async with connect(folder / "monitor.sock") as monitor:
                await _remove_abandoned(monitor, folder)
                for name in names:
                    ours[name] = await _plug(monitor, f"{tag}.{name}")
            yield ours
        finally:
            with contextlib.suppress(GuestFailed):
                async with connect(folder / "monitor.sock") as monitor:
                    await _unplug(monitor, [f"{tag}.{name}" for name in ours])
            mark.unlink(missing_ok=True)
            for port in ours.values():
                port.close()


async def _plug(monitor: Monitor, name: str) -> socket.socket:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    identity = f"exec.{name}"
    try:
        with theirs:
            await monitor.give_fd(theirs.fileno(), identity)
        address = {"type": "fd", "data": {"str": identity}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        await monitor.execute("chardev-add", {"id": identity, "backend": backend})
        device = {"driver": "virtserialport", "bus": "serial.0", "id": EXEC_PORT + name}
        await monitor.execute("device_add", {**device, "chardev": identity, "name": name})
    except BaseException:
        ours.close()
        raise
    return ours


async def _unplug(monitor: Monitor, names: Sequence[str]) -> None:
    for name in names:
        with contextlib.suppress(GuestFailed):
            await monitor.execute("device_del", {"id": EXEC_PORT + name})
    for name in names:
        await _remove_chardev(monitor, f"exec.{name}")


async def _remove_chardev(monitor: Monitor, label: str) -> None:
    """QEMU lets go of it some milliseconds after its device (util/rcu.c)."""
    for _ in range(50):
        try:
            await monitor.execute("chardev-remove", {"id": label})
        except GuestFailed as error:
            if "busy" not in error.message:
                return
            await asyncio.sleep(0.005)
        else:
            return


async def _remove_abandoned(monitor: Monitor, folder: Path) -> None:
    """Take out the ports of commands that were killed."""
    prefix = "exec."
    chardevs = await monitor.execute("query-chardev")
    labels = [str(c["label"]) for c in chardevs if str(c["label"]).startswith(prefix)]
    marks = {label: folder / label.rpartition(".")[0] for label in labels}
    gone = [label for label in labels if not is_held(marks[label])]
    await _unplug(monitor, [label.removeprefix(prefix) for label in gone])
    for label in gone:
        marks[label].unlink(missing_ok=True)
