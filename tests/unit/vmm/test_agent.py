"""The guest agent's client against a peer on the same pipes that speaks the agent's protocol.

Not here: a real agent in a real guest (tests/vm).
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from onecopy.errors import AgentFailed
from onecopy.vmm import agent as agent_module
from onecopy.vmm.agent import Agent
from onecopy.vmm.qemu_process import prepare
from tests.unit.pipe_kit import Peer as PipePeer

_CLIENT = """
import asyncio, sys
from pathlib import Path
from onecopy.vmm.agent import Agent
asyncio.run(Agent(Path(sys.argv[1])).call("of-the-killed", dict))
"""
Request = dict[str, Any]


class Peer(PipePeer):
    """The agent: reads requests; 0xff drops a half one (qga/main.c)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "agent")
        self.seen: list[str] = []

    async def request(self) -> Request:
        line = (await self.line()).rpartition(b"\xff")[2]
        request: Request = json.loads(line)
        self.seen.append(request["execute"])
        return request

    async def answer(self, request: Request) -> None:
        """As the agent does: the id of a sync, the arguments of all else."""
        if request["execute"] == "guest-sync-delimited":
            await self.send(b"\xff" + _line({"return": request["arguments"]["id"]}))
        else:
            await self.send(_line({"return": request["arguments"]}))

    async def serve(self) -> None:
        while True:
            await self.answer(await self.request())


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


@contextlib.asynccontextmanager
async def _serving(peer: Peer) -> AsyncIterator[None]:
    task = asyncio.create_task(peer.serve())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _with_peer(folder: Path, test: Callable[[Agent, Peer], Awaitable[None]]) -> None:
    prepare(folder)

    async def main() -> None:
        peer = Peer(folder)
        try:
            async with asyncio.timeout(60):
                await test(Agent(folder), peer)
        finally:
            peer.close()

    asyncio.run(main())


def test_an_answer(tmp_path: Path) -> None:
    async def test(agent: Agent, peer: Peer) -> None:
        async with _serving(peer):
            assert await agent.call("any", dict, a=1, b="ü\n") == {"a": 1, "b": "ü\n"}
            assert await agent.call("other", dict) == {}
        assert peer.seen == ["any", "other"]

    _with_peer(tmp_path, test)


def test_an_answer_larger_than_a_pipe(tmp_path: Path) -> None:
    async def test(agent: Agent, peer: Peer) -> None:
        async with _serving(peer):
            assert await agent.call("any", dict, text="x" * 300_000) == {"text": "x" * 300_000}

    _with_peer(tmp_path, test)


def test_a_refusal(tmp_path: Path) -> None:
    async def test(agent: Agent, peer: Peer) -> None:
        async def refuse() -> None:
            await peer.request()
            error = {"class": "CommandNotFound", "desc": "The command any has not been found"}
            await peer.send(_line({"error": error}))
            await peer.serve()

        task = asyncio.create_task(refuse())
        with pytest.raises(AgentFailed, match="refused any: The command any has not been found"):
            await agent.call("any", dict)
        # A refusal is an answer: nothing is left over to be discarded.
        assert await agent.call("other", dict) == {}
        assert peer.seen == ["any", "other"]
        task.cancel()

    _with_peer(tmp_path, test)


def test_an_agent_that_does_not_answer(tmp_path: Path) -> None:
    async def test(agent: Agent, peer: Peer) -> None:
        with pytest.raises(AgentFailed, match="did not answer slow within") as caught:
            await agent.call("slow", dict, timeout=0.1)
        assert "onecopy logs" in caught.value.hint
        # Its answer comes after all, and is not taken for that of the next call.
        await peer.answer(await peer.request())
        async with _serving(peer):
            assert await agent.call("next", dict, a=1) == {"a": 1}
        assert peer.seen == ["slow", "guest-sync-delimited", "next"]

    _with_peer(tmp_path, test)


def test_an_agent_that_has_to_be_woken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "_NUDGE", 0.05)

    async def test(agent: Agent, peer: Peer) -> None:
        call = asyncio.create_task(agent.call("any", dict, a=1))
        request = await peer.request()
        assert await peer.line() == await peer.line() == b""
        await peer.answer(request)
        assert await call == {"a": 1}

    _with_peer(tmp_path, test)


def test_the_answer_to_a_killed_client_is_discarded(tmp_path: Path) -> None:
    async def test(agent: Agent, peer: Peer) -> None:
        argv = [sys.executable, "-c", _CLIENT, str(tmp_path)]
        client = await asyncio.create_subprocess_exec(*argv)
        request = await peer.request()
        client.kill()
        assert request["execute"] == "of-the-killed"
        assert await client.wait() == -signal.SIGKILL
        await peer.send(_line({"return": "for the dead"}))
        async with _serving(peer):
            assert await agent.call("mine", dict, a=1) == {"a": 1}
            assert await agent.call("mine", dict, a=2) == {"a": 2}
        assert peer.seen == ["of-the-killed", "guest-sync-delimited", "mine", "mine"]

    _with_peer(tmp_path, test)


def test_a_half_answer_and_a_stale_sync_are_discarded(tmp_path: Path) -> None:
    async def test(agent: Agent, peer: Peer) -> None:
        (tmp_path / "agent.lock").write_bytes(b"!")
        await peer.send(b'{"return": "half of an ans' + b"\xff" + _line({"return": -1}))
        async with _serving(peer):
            assert await agent.call("mine", dict, a=1) == {"a": 1}

    _with_peer(tmp_path, test)


def test_callers_take_turns(tmp_path: Path) -> None:
    async def test(agent: Agent, peer: Peer) -> None:
        calls = [asyncio.create_task(Agent(tmp_path).call("any", dict, n=n)) for n in range(5)]
        for _ in calls:
            request = await peer.request()
            # While one is not answered no other is sent.
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(peer.request(), 0.1)
            await peer.answer(request)
        assert await asyncio.gather(*calls) == [{"n": n} for n in range(5)]

    _with_peer(tmp_path, test)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    async def test(agent: Agent, peer: Peer) -> None:
        async with _serving(peer):
            before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
            for n in range(10):
                await agent.call("any", dict, n=n)
            with pytest.raises(AgentFailed):
                await Agent(tmp_path / "gone").call("any", dict)
            assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208

    _with_peer(tmp_path, test)
