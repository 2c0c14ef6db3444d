"""QEMU's guest agent, over the pipes of a run folder (QEMU docs/interop/qemu-ga-ref).

Any number of commands may talk to one agent: each call is one exchange under a lock of the run
folder. Not here: running programs with their streams (guest/exec.py).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import json
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from onecopy.errors import AgentFailed

#: Seconds an agent may take to answer one call.
TIMEOUT = 30.0


class Agent:
    """One guest's agent; a call opens nothing that outlives it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def call(self, command: str, *, timeout: float = TIMEOUT, **arguments: object) -> Any:
        """Send one command and return its result.

        Raises AgentFailed when the agent refuses it or does not answer within ``timeout`` seconds.
        """
        request = {"execute": command, "arguments": arguments}
        try:
            async with asyncio.timeout(timeout), self._exchange() as pipe:
                reply = await pipe.ask(request)
        except TimeoutError:
            raise AgentFailed(
                f"the guest agent did not answer {command} within {timeout:g} s",
                hint="`onecopy logs GUEST` shows the guest's console",
            ) from None
        except OSError as error:
            raise AgentFailed(f"the guest agent cannot be reached: {error.strerror}") from error
        if "error" in reply:
            raise AgentFailed(f"the guest agent refused {command}: {reply['error']['desc']}")
        return reply.get("return")

    async def write_file(self, path: str, data: bytes) -> None:
        """Write a file of the guest (without a process of its own in the guest)."""
        handle = await self.call("guest-file-open", path=path, mode="w")
        try:
            encoded = base64.b64encode(data).decode()
            await self.call("guest-file-write", handle=handle, **{"buf-b64": encoded})
        finally:
            await self.call("guest-file-close", handle=handle)

    @contextlib.asynccontextmanager
    async def _exchange(self) -> AsyncIterator[_Pipe]:
        """The pipes, locked. A note in the lock file says that an exchange is under way.

        Whoever finds the note of another, whose exchange never ended, first lets the agent
        discard what is left of it.
        """
        lock = os.open(self._folder / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            await _flock(lock)
            with _Pipe(self._folder) as pipe:
                if os.fstat(lock).st_size:
                    await pipe.synchronize()
                os.write(lock, b"!")
                yield pipe
                os.ftruncate(lock, 0)
        finally:
            os.close(lock)


async def _flock(fd: int) -> None:
    delay = 0.001
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            await asyncio.sleep(delay)
            delay = min(delay * 2, 0.05)
        else:
            return


class _Pipe:
    """Both directions, opened so that neither waits for nor loses the other side."""

    def __init__(self, folder: Path) -> None:
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
        self._to = os.open(folder / "agent.in", flags)
        self._from = os.open(folder / "agent.out", flags)
        self._buffer = b""

    def __enter__(self) -> _Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._to)
        os.close(self._from)

    async def ask(self, request: dict[str, object]) -> dict[str, Any]:
        await self._write(json.dumps(request).encode() + b"\n")
        while True:
            reply = json.loads(await self._until(b"\n"))
            if isinstance(reply, dict):
                return reply

    async def synchronize(self) -> None:
        """guest-sync-delimited: the agent drops a half request, we drop all before its 0xff."""
        number = random.getrandbits(31)  # noqa: S311 - a marker, not a secret
        sync = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        await self._write(b"\xff" + json.dumps(sync).encode() + b"\n")
        while True:
            await self._until(b"\xff")
            with contextlib.suppress(ValueError):
                if json.loads(await self._until(b"\n")) == {"return": number}:
                    return

    async def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._to, data) :]
            except BlockingIOError:
                await _ready(self._to, write=True)

    async def _until(self, end: bytes) -> bytes:
        while end not in self._buffer:
            try:
                self._buffer += os.read(self._from, 1 << 20)
            except BlockingIOError:
                await _ready(self._from)
        line, _, self._buffer = self._buffer.partition(end)
        return line


async def _ready(fd: int, *, write: bool = False) -> None:
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    add, remove = (
        (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    )
    add(fd, event.set)
    try:
        await event.wait()
    finally:
        remove(fd)
