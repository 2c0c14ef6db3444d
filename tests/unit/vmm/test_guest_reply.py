"""What guests and their QEMUs may say: all of it is a value of the right type, or an error of ours.

Over real pipes and sockets, whose other end is the test. Not here: the same from a real guest
(tests/hostile).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onecopy.deadline import Deadline
from onecopy.errors import AgentFailed, GuestFailed, OutputFailed, TooLarge
from onecopy.guest import identity
from onecopy.guest.exec import _Started, _Status
from onecopy.guest.exec_streams import Kept, Tail, give, to_file
from onecopy.guest.lifecycle.freeze import frozen
from onecopy.linux.lock import locked
from onecopy.vmm.agent import LIMIT, Agent, exclusive
from onecopy.vmm.argv import Nic
from onecopy.vmm.guest_reply import Nothing, address, decimal, read, shown
from onecopy.vmm.port_pipe import Pipe
from onecopy.vmm.qemu_process import prepare
from tests.hostile.lies import WRONG
from tests.unit.pipe_kit import Peer
from tests.unit.vmm_replies import REPLY

#: Seconds after which something that must come will not come.
STUCK = 30.0
FORMS = [_Started, _Status, Nothing, int, dict]


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        prepare(Path(name))
        yield Path(name)


def with_peer(name: str, test: Callable[[Path, Peer], Awaitable[Any]]) -> Any:
    """What comes of it, with the other end of the pipes of that name."""

    async def main(folder: Path) -> Any:
        peer = Peer(folder, name)
        try:
            async with asyncio.timeout(STUCK):
                return await test(folder, peer)
        finally:
            peer.close()

    with run_folder() as folder:
        return asyncio.run(main(folder))


def answered(data: bytes, form: type[Any]) -> Any:
    """What a call comes to that is answered so, before its time is up."""

    async def test(folder: Path, peer: Peer) -> Any:
        async def answer() -> None:
            await peer.line()
            await peer.send(data)

        task = asyncio.create_task(answer())
        try:
            return await Agent(folder).call("any", form, timeout=0.3)
        finally:
            task.cancel()

    return with_peer("agent", test)


@settings(max_examples=60)
@given(REPLY, st.sampled_from(FORMS))
def test_any_json_is_what_was_wanted_or_an_error(value: Any, form: type[Any]) -> None:
    line = json.dumps(value).encode() + b"\n"
    try:
        assert isinstance(answered(line, form), form)
    except AgentFailed as error:
        assert error.message.isprintable()
        assert len(error.message) < 1000


@settings(max_examples=60)
@given(st.binary(max_size=300), st.sampled_from(FORMS))
@example(b"\xff" * 300, Nothing)
def test_any_bytes_are_what_was_wanted_or_an_error(data: bytes, form: type[Any]) -> None:
    with contextlib.suppress(AgentFailed):
        assert isinstance(answered(data + b"\n", form), form)


@settings(max_examples=150)
@given(st.binary() | REPLY.map(lambda value: json.dumps(value).encode()), st.sampled_from(FORMS))
@example(b"[" * 100_000 + b"]" * 100_000, Nothing)
@example(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, Nothing)
@example(b'{"pid": ' + b"9" * 5000 + b"}", _Started)
@example(b'{"pid": 1e400}', _Started)
@example(b"9" * 5000, int)
@example(b"-0", int)
@example(b'{"pid": 5}\0', _Started)
@example(b'"\\ud800"', dict)
@example(b"\xef\xbb\xbf{}", Nothing)
def test_the_reader_raises_nothing_else(data: bytes, form: type[Any]) -> None:
    with contextlib.suppress(AgentFailed):
        assert isinstance(read(data, form, "it"), form)


@pytest.mark.parametrize("name", WRONG)
def test_the_ranges_that_a_status_has(name: str) -> None:
    """The lies about a program that a real guest tells, too."""
    (command, word), *_ = WRONG[name]
    if command == "guest-exec-status" and "raw" in word:
        with pytest.raises(AgentFailed):
            read(json.dumps(json.loads(_raw(word))["return"]).encode(), _Status, "it")


def _raw(word: dict[str, Any]) -> bytes:
    import base64

    return base64.b64decode(word["raw"])


def test_a_line_has_a_limit() -> None:
    async def flood(folder: Path, peer: Peer) -> None:
        with Pipe(folder, "agent") as pipe:
            sending = asyncio.create_task(peer.send(b"x" * (LIMIT + (1 << 20))))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with pytest.raises(AgentFailed, match=f"more than {LIMIT} bytes"):
                await pipe.until(b"\n", LIMIT)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30 << 10
            sending.cancel()

    with_peer("agent", flood)


@pytest.mark.parametrize("size", [0, 1, 999, 1000])
def test_a_line_up_to_the_limit_comes_whole(size: int) -> None:
    async def test(folder: Path, peer: Peer) -> None:
        with Pipe(folder, "agent") as pipe:
            await peer.send(b"x" * size + b"\n" + b"y" * 1001 + b"\n")
            assert await pipe.until(b"\n", 1000) == b"x" * size
            with pytest.raises(AgentFailed):
                await pipe.until(b"\n", 1000)

    with_peer("agent", test)


@settings(max_examples=50)
@given(st.binary(max_size=2000))
def test_lines_are_cut_where_they_end(data: bytes) -> None:
    async def test(folder: Path, peer: Peer) -> None:
        with Pipe(folder, "agent") as pipe:
            await peer.send(data + b"\n")
            for part in data.split(b"\n"):
                assert await pipe.until(b"\n", 2000) == part

    with_peer("agent", test)


def test_a_flood_lets_the_time_be_up() -> None:
    """A peer that always has more: whoever waits for an end that never comes waits his time."""

    async def test(folder: Path, peer: Peer) -> None:
        async def flood() -> None:
            while True:
                await peer.send(b"x" * (1 << 16))

        sending = asyncio.create_task(flood())
        with Pipe(folder, "agent") as pipe:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await pipe.skip(b"\n")
            pipe.drain()
        sending.cancel()

    with_peer("agent", test)


def test_the_end_of_qemu_ends_each_wait() -> None:
    async def test(folder: Path, peer: Peer) -> None:
        calls = [asyncio.create_task(Agent(folder).ping(STUCK)) for _ in range(3)]
        with Pipe(folder, "agent") as pipe:
            full = asyncio.create_task(pipe.write(bytes(1 << 20)))
            await asyncio.sleep(0.1)
            peer.close()
            for each in (*calls, full):
                with pytest.raises(GuestFailed, match="has ended"):
                    await each
        with pytest.raises(GuestFailed, match="has ended"):
            Pipe(folder, "agent")

    with_peer("agent", test)


def test_who_talks_to_the_agent_all_the_time_is_told() -> None:
    async def test(folder: Path, peer: Peer) -> None:
        async with locked(folder / "agent.lock"):
            with pytest.raises(AgentFailed, match=r"busy with other commands for 0\.1 s"):
                async with exclusive(folder, 0.1):
                    pass
        async with exclusive(folder, 0.1):
            pass

    with_peer("agent", test)


WANTED = identity.Identity("web-1", "0" * 32, Nic("52:54:00:00:00:01", "198.18.1.1"))


def becoming(*answers: bytes) -> str:
    """What a guest comes to that says this about itself; ``NOW`` stands for the time."""

    async def test(folder: Path, peer: Peer) -> Any:
        async def answer() -> None:
            await peer.line()
            for each in answers:
                now = str(time.time_ns() // 1_000_000).encode()
                await peer.send(each.replace(b"NOW", now))

        task = asyncio.create_task(answer())
        try:
            return await identity.become(folder, WANTED)
        finally:
            task.cancel()

    found: str = with_peer("identity", test)
    return found


TRUTH = b"web-1 " + b"0" * 32 + b" 52:54:00:00:00:01 198.18.1.1 NOW\n"


def test_a_guest_that_becomes_what_it_should() -> None:
    assert becoming(TRUTH, b"ready\n") == "198.18.1.1"


@pytest.mark.parametrize(
    "said",
    [
        b"\n",
        b"web-2" + TRUTH[5:],
        TRUTH.replace(b"NOW", b"9" * 5000),
        TRUTH.replace(b"NOW", "²³".encode()),
        TRUTH.replace(b"NOW", b"-1"),
        TRUTH.replace(b"NOW", b"0"),
        TRUTH.replace(b"198.18.1.1", b"198.18.1.1/../x"),
        TRUTH.replace(b"198.18.1.1", b"\x1b[2J"),
        TRUTH.replace(b"198.18.1.1", b"300.1.1.1"),
        b"failed\n",
        b"failed hook \x1b]0;x\x07" + b"x" * 3000 + b"\n",
        b"failed what \xff\xfe\n",
        b"x" * 5000,
        b"\xff" * 100 + b"\n",
    ],
)
def test_a_guest_that_says_something_else(said: bytes) -> None:
    with pytest.raises(AgentFailed) as caught:
        becoming(said)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1000


@settings(max_examples=60)
@given(st.binary(min_size=1, max_size=400))
def test_a_guest_that_says_anything(said: bytes) -> None:
    with contextlib.suppress(AgentFailed):
        assert becoming(said + b"\n" + said + b"\n") == "198.18.1.1"


def freezing(*answers: bytes) -> list[str]:
    """What is told of a guest that answers so, one after the other, and what it is asked."""

    async def test(folder: Path, peer: Peer) -> Any:
        asked: list[str] = []

        async def answer() -> None:
            for each in answers:
                asked.append((await peer.line()).decode())
                await peer.send(each)

        task = asyncio.create_task(answer())
        try:
            async with frozen(folder, asked.append) as still:
                still()
            await task
            return asked
        finally:
            task.cancel()

    found: list[str] = with_peer("identity", test)
    return found


def test_answers_to_interrupted_commands_are_passed_over() -> None:
    late = b"thawed\nprepared\nfrozen\n"
    assert freezing(late, b"frozen\n", b"thawed\n") == ["freeze", "freeze", "thaw"]


def test_what_cannot_be_frozen_is_told() -> None:
    said = freezing(b"frozen nothing connections\n" * 2, b"", b"thawed\n")
    told = [each for each in said if each.startswith("skipped: ")]
    assert len(told) == 2
    assert "control groups" in told[0]
    assert "INET_DIAG" in told[1]


@pytest.mark.parametrize("said", [b"failed freeze x\n", b"thawed\n" * 40, b"x" * 5000, b"\xff\n"])
def test_a_guest_that_does_not_freeze(said: bytes) -> None:
    with pytest.raises(AgentFailed) as caught:
        freezing(said, b"thawed\n")
    assert caught.value.message.isprintable()


@given(st.text() | st.binary())
def test_words_for_a_message(said: str | bytes) -> None:
    assert shown(said).isprintable()
    assert len(shown(said, 50)) <= 53
    with contextlib.suppress(AgentFailed):
        assert 0 <= decimal(said, "it", most=99) <= 99
    with contextlib.suppress(AgentFailed):
        assert address(said, "it").count(".") == 3


def test_what_is_kept_has_a_limit() -> None:
    kept = Kept(10)
    kept(b"12345")
    kept(b"67890")
    with pytest.raises(TooLarge, match="more than 10 B"):
        kept(b"1")
    assert kept == b"1234567890"
    tail, piece = Tail(), bytes(1 << 16)
    with pytest.raises(TooLarge):
        while True:
            tail(piece)
    assert len(tail) == 1 << 16


def test_who_does_not_read_lets_the_time_be_up(tmp_path: Path) -> None:
    """A pipe that is full holds up only the program that writes to it."""
    there, here = os.pipe()

    async def main() -> None:
        sink = to_file(here)
        async with Deadline.after(0.3).scope():
            await give(sink, bytes(1 << 20))

    try:
        with pytest.raises(TimeoutError):
            asyncio.run(main())
        assert len(os.read(there, 1 << 20)) >= 1 << 16
        os.close(there)
        there = -1
        with pytest.raises(OutputFailed):
            asyncio.run(main())
    finally:
        os.close(here)
        if there >= 0:
            os.close(there)
    with (tmp_path / "file").open("wb", buffering=0) as file:
        asyncio.run(_to(file.fileno()))
    assert (tmp_path / "file").stat().st_size == 1 << 20


async def _to(fd: int) -> None:
    await give(to_file(fd), bytes(1 << 20))


def test_deadlines_nest() -> None:
    assert Deadline().left() is None
    assert Deadline.after(None).when is None
    assert (Deadline().sooner(5).left() or 0) > 4
    assert (Deadline.after(100).sooner(5).left() or 0) < 6
    assert (Deadline.after(1).sooner(5).left() or 9) <= 1
    assert Deadline(0.0).left() == 0.0

    async def main() -> None:
        async with Deadline.after(0.05).scope(), Deadline.after(STUCK).scope():
            await asyncio.sleep(STUCK)

    with pytest.raises(TimeoutError):
        asyncio.run(main())


class _Sized(msgspec.Struct):
    text: Annotated[str, msgspec.Meta(max_length=3)]


def test_a_wrong_answer_is_shown_in_short() -> None:
    with pytest.raises(AgentFailed) as caught:
        read(json.dumps({"text": "x" * 100_000}).encode(), _Sized, "it")
    assert len(caught.value.message) < 300
