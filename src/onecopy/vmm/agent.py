"""QEMU's guest agent, over the pipes of a run folder (QEMU docs/interop/qemu-ga-ref).

Any number of commands may talk to one agent: each call is one exchange under a lock of the run
folder. Not here: running programs with their streams (guest/exec.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from onecopy.errors import AgentFailed
from onecopy.host.lock import locked
from onecopy.vmm.pipe import Pipe

#: Seconds an agent may take to answer one call, on a host that has much else to do.
TIMEOUT = 60.0
_NUDGE = 5.0


class Agent:
    """One guest's agent; a call opens nothing that outlives it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def call(self, command: str, *, timeout: float = TIMEOUT, **arguments: object) -> Any:
        """Send one command and return its result.

        Raises AgentFailed when the agent refuses it or does not answer within ``timeout`` seconds.
        """
        request: dict[str, object] = {"execute": command, "arguments": arguments}
        try:
            async with asyncio.timeout(timeout), self._exchange() as pipe:
                reply = await _ask(pipe, request)
        except TimeoutError:
            raise AgentFailed(
                f"the guest agent did not answer {command} within {timeout:g} s",
                hint="the guest's console tells more: see above, or `onecopy logs GUEST`",
            ) from None
        except OSError as error:
            raise AgentFailed(f"the guest agent cannot be reached: {error.strerror}") from error
        if "error" in reply:
            raise AgentFailed(f"the guest agent refused {command}: {reply['error']['desc']}")
        return reply.get("return")

    @contextlib.asynccontextmanager
    async def _exchange(self) -> AsyncIterator[Pipe]:
        """The pipes, locked. A note in the lock file says that an exchange is under way.

        Whoever finds the note of another, whose exchange never ended, first lets the agent
        discard what is left of it.
        """
        async with locked(self._folder / "agent.lock") as lock:
            with Pipe(self._folder, "agent") as pipe:
                if os.fstat(lock).st_size:
                    await _synchronize(pipe)
                os.write(lock, b"!")
                yield pipe
                os.ftruncate(lock, 0)


async def _ask(pipe: Pipe, request: dict[str, object]) -> dict[str, Any]:
    await pipe.write(json.dumps(request).encode() + b"\n")
    while True:
        reply = json.loads(await _line(pipe))
        if isinstance(reply, dict):
            return reply


async def _line(pipe: Pipe) -> bytes:
    """The next line. While none comes an empty one is sent now and then, which agents pass over.

    Under nested KVM a guest that was at rest has been seen not to notice what it was sent, for as
    long as nothing else woke it.
    """
    while True:
        try:
            async with asyncio.timeout(_NUDGE):
                return await pipe.until(b"\n")
        except TimeoutError:
            await pipe.write(b"\n")


async def _synchronize(pipe: Pipe) -> None:
    """guest-sync-delimited: the agent drops a half request, we drop all before its 0xff."""
    number = random.getrandbits(31)
    sync = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
    await pipe.write(b"\xff" + json.dumps(sync).encode() + b"\n")
    while True:
        await pipe.until(b"\xff")
        with contextlib.suppress(ValueError):
            if json.loads(await pipe.until(b"\n")) == {"return": number}:
                return
