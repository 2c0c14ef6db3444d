"""QEMU's guest agent, over the pipes of a run directory.

Any number of commands may use one agent: each call is one exchange under a lock in the run
directory. Its answers are validated like all data from a guest (guest_reply.py).

Not here: running programs with their streams (guest/exec.py).

Source:
    QEMU docs/interop/qemu-ga-ref.
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

#: Seconds that the agent may take for one call, on a busy host.
TIMEOUT = 60.0
#: The limit on the size of an answer in bytes.
LIMIT = 1 << 20
_NUDGE = 5.0

T = TypeVar("T")


class _Refusal(msgspec.Struct, frozen=True):
    desc: Annotated[str, msgspec.Meta(max_length=1 << 16)]


class _Reply(msgspec.Struct, frozen=True):
    """Exactly one of the fields is set."""

    result: msgspec.Raw | msgspec.UnsetType = msgspec.field(name="return", default=msgspec.UNSET)
    error: _Refusal | msgspec.UnsetType = msgspec.UNSET


class _Sync(msgspec.Struct, frozen=True):
    number: int = msgspec.field(name="return")


class Agent:
    """The agent of one guest; a call leaves nothing open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def call(
        self, command: str, form: type[T], *, timeout: float = TIMEOUT, **arguments: object
    ) -> T:
        """Execute a command and return its result.

        Args:
            form: the type that the result must have.
            timeout: seconds.
            arguments: the arguments of the command.

        Raises:
            AgentFailed: the agent refused, sent an invalid answer or did not answer in time.
            GuestFailed: the guest has ended.
        """
        request: dict[str, object] = {"execute": command, "arguments": arguments}
        what = f"the guest agent's answer to {command}"
        try:
            async with asyncio.timeout(timeout), _exchange(self._folder, timeout) as pipe:
                await pipe.write(json.dumps(request).encode() + b"\n")
                reply = read(await _read_line(pipe), _Reply, what)
        except TimeoutError:
            raise AgentFailed(
                f"the guest agent did not answer {command} within {timeout:g} s",
                hint="the guest's console may show the reason: see above, or run `onecopy logs "
                "GUEST`",
            ) from None
        except OSError as error:
            raise AgentFailed(f"cannot reach the guest agent: {error.strerror}") from error
        if isinstance(reply.error, _Refusal):
            raise AgentFailed(f"the guest agent refused {command}: {shown(reply.error.desc)}")
        if isinstance(reply.result, msgspec.UnsetType):
            raise AgentFailed(f"{what} is neither a result nor an error")
        return read(bytes(reply.result), form, what)

    async def ping(self, timeout: float) -> None:
        """Wait until the agent answers.

        Raises:
            AgentFailed: it did not answer within ``timeout`` seconds.
        """
        await self.call("guest-ping", Nothing, timeout=timeout)


@contextlib.asynccontextmanager
async def exclusive(folder: Path, timeout: float = TIMEOUT) -> AsyncIterator[None]:
    """Keep other commands from using the agent of a run directory.

    Raises:
        AgentFailed: another command has been using it for ``timeout`` seconds.
    """
    late = AgentFailed(
        f"the guest agent of {folder.name} has been busy with other commands for {timeout:g} s",
        hint="repeat the command when they have ended",
    )
    async with locked_within(folder / "agent.lock", timeout, late):
        yield


@contextlib.asynccontextmanager
async def _exchange(folder: Path, timeout: float) -> AsyncIterator[Pipe]:
    """Lock the pipes, and mark in the lock file that an exchange is in progress.

    If the mark of an interrupted exchange is found, the agent first discards the rest of that
    exchange.
    """
    # With a short timeout the lock is tried more often.
    async with locked(folder / "agent.lock", min(0.05, timeout / 1000)) as lock:
        with Pipe(folder, "agent") as pipe:
            if os.fstat(lock).st_size:
                await _synchronize(pipe)
            os.write(lock, b"!")
            # No request is pending, so any data in the pipe is not an answer.
            pipe.drain()
            yield pipe
            os.ftruncate(lock, 0)


async def _read_line(pipe: Pipe) -> bytes:
    """Read the next line, and send an empty one from time to time, which agents ignore.

    Under nested KVM an idle guest sometimes does not notice incoming data until something wakes it.
    """
    while True:
        try:
            async with asyncio.timeout(_NUDGE):
                return await pipe.until(b"\n", LIMIT)
        except TimeoutError:
            await pipe.write(b"\n")


async def _synchronize(pipe: Pipe) -> None:
    """Run guest-sync-delimited: the agent drops a partial request, we drop all before 0xff."""
    number = random.getrandbits(31)
    sync = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
    await pipe.write(b"\xff" + json.dumps(sync).encode() + b"\n")
    while True:
        await pipe.skip(b"\xff")
        with contextlib.suppress(AgentFailed):
            if read(await pipe.until(b"\n", LIMIT), _Sync, "sync").number == number:
                return
