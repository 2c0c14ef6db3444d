"""The service: what one guest does is no matter of another one's. Guests here are pipes.

Not here: what is done for them (tests/vm/test_requests.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from onecopy.errors import AlreadyExists
from onecopy.guest.run_directory import RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.guest.segments import protocol, service
from onecopy.guest.segments.protocol import LIMIT, Request
from onecopy.store import Store
from tests.unit.guest_kit import record

#: Seconds after which something that must come will not come.
STUCK = 30
Answers = Callable[[str, Request], Awaitable[bytes]]
NONSENSE = b"what?\n" * 10


class Guest:
    """The guest's end of its pipes, which are there as QEMU's are: open for as long as it lives."""

    def __init__(self, host: Runtime, name: str) -> None:
        self.folder = host.run / name
        self.folder.mkdir()
        for end in ("in", "out"):
            os.mkfifo(self.folder / f"segment.{end}")
        flags = os.O_RDWR | os.O_NONBLOCK
        self.to = os.open(self.folder / "segment.out", flags)
        self.back = os.open(self.folder / "segment.in", flags)
        self.came = b""

    def hand_out(self) -> Guest:
        RunDirectory(self.folder).write(record(self.folder.name, kind="booted", pid=0))
        return self

    def say(self, data: bytes) -> int:
        """How much of ``data`` the pipe takes."""
        try:
            return os.write(self.to, data)
        except BlockingIOError:
            return 0

    def hear(self) -> list[bytes]:
        """The lines that have come by now."""
        with contextlib.suppress(BlockingIOError):
            self.came += os.read(self.back, 1 << 20)
        return self.came.splitlines(keepends=True)

    async def answer(self, last: bytes) -> list[bytes]:
        """The lines that come, up to one that begins so."""
        async with asyncio.timeout(STUCK):
            while not any(line.startswith(last) for line in self.hear()):
                await asyncio.sleep(0.01)
        return self.hear()


@pytest.fixture
def host(tmp_path: Path) -> Runtime:
    run = tmp_path / "run"
    run.mkdir()
    return Runtime(Store(tmp_path / "store"), run)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answers], None]:
    """``answers(f)``: requests are answered by ``f(guest, request)``; "ID ok" if not called."""

    def use(function: Answers) -> None:
        monkeypatch.setattr(service, "answer", lambda _, guest, request: function(guest, request))

    async def ok(guest: str, request: Request) -> bytes:
        return protocol.ok(request.id)

    use(ok)
    return use


def during(
    host: Runtime, scene: Coroutine[Any, Any, None], told: list[str] | None = None
) -> list[str]:
    """Play ``scene`` while the service runs; returns what the service told."""
    told = [] if told is None else told

    async def play() -> None:
        serving = asyncio.create_task(service.serve(host, told.append))
        await asyncio.sleep(0)
        try:
            await scene
            assert not serving.done()
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    asyncio.run(play())
    return told


def test_guests_that_come_and_go(host: Runtime, answers: Callable[[Answers], None]) -> None:
    async def scene() -> None:
        for _ in range(2):
            guest = Guest(host, "guest").hand_out()
            guest.say(b"1 list\n2 find app\n")
            await guest.answer(b"2 ok")
            shutil.rmtree(guest.folder)

    told = during(host, scene())
    assert told == ["guest: list: ok", "guest: find app: ok"] * 2


def test_who_asks_while_it_starts_is_answered_once_it_is_there(
    host: Runtime, answers: Callable[[Answers], None]
) -> None:
    async def scene() -> None:
        early, other = Guest(host, "early"), Guest(host, "other").hand_out()
        early.say(b"1 load app /srv shared\n")
        other.say(b"1 list\n")
        await other.answer(b"1 ok")
        assert early.hear() == []
        early.hand_out()
        await early.answer(b"1 ok")

    during(host, scene())


def test_one_request_of_a_guest_at_a_time_and_none_waits_for_another_guest(
    host: Runtime, answers: Callable[[Answers], None]
) -> None:
    go_on, busy = threading.Event(), threading.Lock()

    async def slow(guest: str, request: Request) -> bytes:
        if guest == "slow":
            assert busy.acquire(blocking=False), "two requests of one guest at once"
            go_on.wait(STUCK)
            busy.release()
        return protocol.ok(request.id)

    async def scene() -> None:
        first, second = (Guest(host, name).hand_out() for name in ("slow", "quick"))
        first.say(b"1 list\n2 list\n")
        for number in range(5):
            second.say(b"%d list\n" % number)
            await second.answer(b"%d ok" % number)
        assert first.hear() == []
        go_on.set()
        assert await first.answer(b"2 ok") == [b"1 ok\n", b"2 ok\n"]

    answers(slow)
    during(host, scene())


@pytest.mark.parametrize("garbage", [b"\x00\xff" * 2048, b"1 list\n" * 600, NONSENSE, b"\n" * 4096])
def test_a_flood_stays_in_its_own_pipe(
    host: Runtime,
    answers: Callable[[Answers], None],
    monkeypatch: pytest.MonkeyPatch,
    garbage: bytes,
) -> None:
    # No turn comes back: what is read now is all that a burst may be.
    monkeypatch.setattr(service, "_PAUSE", 1e9)
    taken = 0

    async def scene() -> None:
        nonlocal taken
        rogue, other = Guest(host, "rogue").hand_out(), Guest(host, "other").hand_out()
        for number in range(service._BURST // 2 - 1):
            taken += rogue.say(garbage)
            other.say(b"%d list\n" % number)
            await other.answer(b"%d ok" % number)
        while size := rogue.say(garbage):
            taken += size
        for _ in range(100):
            await asyncio.sleep(0)
            taken += rogue.say(garbage)
        # The pipe holds 64 KiB (pipe(7)).
        assert taken <= service._BURST * service._CHUNK + (64 << 10)
        assert len(rogue.hear()) <= service._BURST

    during(host, scene())


def test_nonsense_is_answered_once_and_what_makes_sense_always(
    host: Runtime, answers: Callable[[Answers], None]
) -> None:
    async def scene() -> None:
        guest = Guest(host, "guest").hand_out()
        guest.say(NONSENSE + b"x" * 3 * LIMIT + b"\n1 list\n" + NONSENSE + b"2 list\n")
        lines = await guest.answer(b"2 ok")
        assert [line.split()[0] for line in lines] == [b"-", b"1", b"2"]
        assert lines[0].startswith(b"- error bad-request 2 ")

    told = during(host, scene())
    assert len(told) == 3


def test_who_does_not_read_loses_whole_lines_and_is_still_heard(
    host: Runtime, answers: Callable[[Answers], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_READING", 0.05)

    told: list[str] = []

    async def long(guest: str, request: Request) -> bytes:
        count = 1000 if request.verb == "list" else 0
        items = [protocol.item(request.id, "x" * 500) for _ in range(count)]
        return b"".join((*items, protocol.ok(request.id)))

    async def scene() -> None:
        deaf, other = Guest(host, "deaf").hand_out(), Guest(host, "other").hand_out()
        deaf.say(b"1 list\n2 find app\n")
        other.say(b"1 find app\n")
        await other.answer(b"1 ok")
        async with asyncio.timeout(STUCK):
            while not any("deaf: find" in line for line in told):
                await asyncio.sleep(0.01)
        # Given up for want of room; a short line may have had some left.
        lines = deaf.hear()
        assert b"1 ok\n" not in lines
        assert {len(line) for line in lines} - {len(b"2 ok\n")} == {len(b"1 item \n") + 500}
        deaf.say(b"3 find app\n")
        assert (await deaf.answer(b"3 ok"))[len(lines) :] == [b"3 ok\n"]

    answers(long)
    during(host, scene(), told)


def test_a_machine_that_does_not_answer_does_not_keep_the_workers(
    host: Runtime, answers: Callable[[Answers], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_TIMEOUT", 0.05)
    tried: list[str] = []

    async def stuck(guest: str, request: Request) -> bytes:
        if guest.startswith("stuck"):
            tried.append(guest)
            await asyncio.sleep(STUCK)
        return protocol.ok(request.id)

    async def scene() -> None:
        names = [f"stuck-{number}" for number in range(2 * service._AT_ONCE)]
        guests = [Guest(host, name).hand_out() for name in names]
        for guest in guests:
            guest.say(b"1 list\n2 list\n3 list\n")
        other = Guest(host, "other").hand_out()
        for number in range(10):
            other.say(b"%d list\n" % number)
            await other.answer(b"%d ok" % number)
        async with asyncio.timeout(STUCK):
            while len(tried) < len(names):
                await asyncio.sleep(0.01)
        assert sorted(tried) == sorted(names)

    answers(stuck)
    during(host, scene())


def test_a_failure_of_ours_is_one_refused_request(
    host: Runtime, answers: Callable[[Answers], None]
) -> None:
    async def wrong(guest: str, request: Request) -> bytes:
        if request.verb == "find":
            raise RuntimeError("/a/path/of/the/host")
        return protocol.ok(request.id)

    async def scene() -> None:
        guest = Guest(host, "guest").hand_out()
        guest.say(b"1 find app\n2 list\n")
        lines = await guest.answer(b"2 ok")
        assert lines[0].startswith(b"1 error error 1 ")
        assert b"/a/path" not in lines[0]

    answers(wrong)
    during(host, scene())


def test_a_guest_that_goes_while_it_is_answered(
    host: Runtime, answers: Callable[[Answers], None]
) -> None:
    go_on, begun = threading.Event(), threading.Event()

    async def slow(guest: str, request: Request) -> bytes:
        if request.verb == "find":
            begun.set()
            go_on.wait(STUCK)
        return protocol.ok(request.id)

    async def scene() -> None:
        guest = Guest(host, "guest").hand_out()
        guest.say(b"1 find app\n")
        await asyncio.to_thread(begun.wait, STUCK)
        shutil.rmtree(guest.folder)
        again = Guest(host, "guest").hand_out()
        again.say(b"1 list\n")
        assert await again.answer(b"1 ok") == [b"1 ok\n"]
        go_on.set()

    answers(slow)
    during(host, scene())


def test_one_for_a_store(host: Runtime, answers: Callable[[Answers], None]) -> None:
    async def scene() -> None:
        with pytest.raises(AlreadyExists):
            await service.serve(host)

    during(host, scene())
    # The lock went with it.
    during(host, asyncio.sleep(0))
