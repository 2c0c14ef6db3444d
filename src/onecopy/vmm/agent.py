"""QEMU's guest agent, over the pipes of a run folder (QEMU docs/interop/qemu-ga-ref).

Any number of commands may talk to one agent: each call is one exchange under a lock of the run
folder. What it answers is believed as little as all that a guest says (guest_reply.py). Not here:
running programs with their streams (guest/exec.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from onecopy.errors import AgentFailed
from onecopy.linux.lock import locked, locked_within
from onecopy.vmm.guest_reply import Nothing, read, shown
from onecopy.vmm.port_pipe import Pipe

#: Seconds an agent may take to answer one call, on a host that has much else to do.
TIMEOUT = 60.0
#: Bytes that an answer may have.
LIMIT = 1 << 20
_NUDGE = 5.0

T = TypeVar("T")


class _Refusal(msgspec.Struct, frozen=True):
    desc: Annotated[str, msgspec.Meta(max_length=1 << 16)]


class _Reply(msgspec.Struct, frozen=True):
    """One of the two."""

    result: msgspec.Raw | msgspec.UnsetType = msgspec.field(name="return", default=msgspec.UNSET)
    error: _Refusal | msgspec.UnsetType = msgspec.UNSET


class _Sync(msgspec.Struct, frozen=True):
    number: int = msgspec.field(name="return")


class Agent:
    """One guest's agent; a call opens nothing that outlives it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def call(
        self, command: str, form: type[T], *, timeout: float = TIMEOUT, **arguments: object
    ) -> T:
        """Send one command and return its result, which must be of the type ``form``.

        Raises AgentFailed when the agent refuses it, answers anything else, or does not answer
        within ``timeout`` seconds; GuestFailed when the guest ends.
        """
        request: dict[str, object] = {"execute": command, "arguments": arguments}
        what = f"the guest agent's answer to {command}"
        try:
            async with asyncio.timeout(timeout), _exchange(self._folder, timeout) as pipe:
                await pipe.write(json.dumps(request).encode() + b"\n")
                reply = read(await _line(pipe), _Reply, what)
        except TimeoutError:
            raise AgentFailed(
                f"the guest agent did not answer {command} within {timeout:g} s",
                hint="the guest's console tells more: see above, or `onecopy logs GUEST`",
            ) from None
        except OSError as error:
            raise AgentFailed(f"the guest agent cannot be reached: {error.strerror}") from error
        if isinstance(reply.error, _Refusal):
            raise AgentFailed(f"the guest agent refused {command}: {shown(reply.error.desc)}")
        if isinstance(reply.result, msgspec.UnsetType):
            raise AgentFailed(f"{what} is neither a result nor an error")
        return read(bytes(reply.result), form, what)

    async def ping(self, timeout: float) -> None:
        """Wait until it answers; raise AgentFailed if it does not within ``timeout`` seconds."""
        await self.call("guest-ping", Nothing, timeout=timeout)


@contextlib.asynccontextmanager
async def silent(folder: Path, timeout: float = TIMEOUT) -> AsyncIterator[None]:
    """Have no command in the middle of an exchange with the agent of this run folder.

    Raises AgentFailed if one is for ``timeout`` seconds.
    """
    late = AgentFailed(
        f"other commands have talked to the agent of {folder.name} for {timeout:g} s",
        hint="try again when they have ended",
    )
    async with locked_within(folder / "agent.lock", timeout, late):
        yield


@contextlib.asynccontextmanager
async def _exchange(folder: Path, timeout: float) -> AsyncIterator[Pipe]:
    """The pipes, locked. A note in the lock file says that an exchange is under way.

    Whoever finds the note of another, whose exchange never ended, first lets the agent discard what
    is left of it.
    """
    # Who has little time looks more often whether it is free.
    async with locked(folder / "agent.lock", min(0.05, timeout / 1000)) as lock:
        with Pipe(folder, "agent") as pipe:
            if os.fstat(lock).st_size:
                await _synchronize(pipe)
            os.write(lock, b"!")
            # Nothing is asked, so nothing that is there is an answer.
            pipe.drain()
            yield pipe
            os.ftruncate(lock, 0)


async def _line(pipe: Pipe) -> bytes:
    """The next line. While none comes an empty one is sent now and then, which agents pass over.

    Under nested KVM a guest that was at rest has been seen not to notice what it was sent, for as
    long as nothing else woke it.
    """
    while True:
        try:
            async with asyncio.timeout(_NUDGE):
                return await pipe.until(b"\n", LIMIT)
        except TimeoutError:
            await pipe.write(b"\n")


async def _synchronize(pipe: Pipe) -> None:
    """guest-sync-delimited: the agent drops a half request, we drop all before its 0xff."""
    number = random.getrandbits(31)
    sync = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
    await pipe.write(b"\xff" + json.dumps(sync).encode() + b"\n")
    while True:
        await pipe.skip(b"\xff")
        with contextlib.suppress(AgentFailed):
            if read(await pipe.until(b"\n", LIMIT), _Sync, "sync").number == number:
                return
