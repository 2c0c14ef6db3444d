"""Starting several guests: all or none, what keeps and what ends. Guests here are only records."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from onecopy.errors import GuestFailed, InsufficientResources, InvalidInput, OnecopyError
from onecopy.guest.lifecycle import admission
from onecopy.guest.lifecycle.batch import start_many
from onecopy.guest.lifecycle.start import names_for
from onecopy.guest.run_directory import Batch, GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB
from tests.unit.guest_kit import record

NAMES = ["g-1", "g-2", "g-3", "g-4"]


class _Batch:
    def __init__(self, host: "_Host") -> None:
        self._host = host

    def hand_out(self) -> None:
        self._host.handed_out = set(self._host.running)


class _Host:
    """Which guests run: those that were started and not ended."""

    def __init__(self, failing: dict[str, Exception] | None = None, slow: float = 0) -> None:
        self.dead: set[str] = set()
        self.running: set[str] = set()
        self.begun: set[str] = set()
        self.handed_out: set[str] = set()
        self.ready: asyncio.Queue[str] = asyncio.Queue()
        self._failing = failing or {}
        self._slow = slow

    async def start(self, name: str, batch: Batch) -> GuestRecord:
        assert isinstance(batch, _Batch)
        self.begun.add(name)
        if name in self._failing:
            raise self._failing[name]
        await asyncio.sleep(self._slow)
        self.running.add(name)
        self.ready.put_nowait(name)
        return record(name, pid=0 if name in self.dead else os.getpid())

    def starts(self) -> dict[str, Callable[[Batch], Awaitable[GuestRecord]]]:
        return {name: partial(self.start, name) for name in NAMES}

    def end(self, *records: GuestRecord) -> None:
        self.running -= {each.name for each in records}

    @contextmanager
    def batch(self, owner: Path | None = None) -> Iterator["_Batch"]:
        assert owner is None
        yield _Batch(self)

    def as_host(self) -> Runtime:
        return cast(Runtime, self)


def _run(host: _Host, *, keep_going: bool = False) -> tuple[list[str], list[str]]:
    done = asyncio.run(start_many(host.as_host(), host.starts(), keep_going=keep_going))
    return [guest.name for guest in done.guests], [name for name, _ in done.failures]


def test_all_start_in_the_order_of_their_names() -> None:
    host = _Host()
    assert _run(host) == (NAMES, [])
    assert host.running == host.handed_out == set(NAMES)


@pytest.mark.parametrize("slow", [0, 0.02])
@pytest.mark.parametrize("failing", NAMES)
def test_one_failure_ends_all_others(failing: str, slow: float) -> None:
    host = _Host({failing: GuestFailed("it broke")}, slow)
    with pytest.raises(GuestFailed, match="it broke"):
        _run(host)
    assert host.running == host.handed_out == set()


def test_a_late_failure_ends_those_that_run_already() -> None:
    host = _Host()

    async def start(name: str, batch: Batch) -> GuestRecord:
        if name == NAMES[-1]:
            for _ in NAMES[:-1]:
                await host.ready.get()
            raise GuestFailed("the last one broke")
        return await host.start(name, batch)

    with pytest.raises(GuestFailed):
        asyncio.run(start_many(host.as_host(), {name: partial(start, name) for name in NAMES}))
    assert host.begun == set(NAMES[:-1])
    assert host.running == set()


def test_keep_going_keeps_the_others_and_tells_the_failures() -> None:
    host = _Host({"g-2": GuestFailed("it broke"), "g-4": GuestFailed("this, too")})
    assert _run(host, keep_going=True) == (["g-1", "g-3"], ["g-2", "g-4"])
    assert host.running == host.handed_out == {"g-1", "g-3"}


@pytest.mark.parametrize("keep_going", [False, True])
def test_one_that_ended_meanwhile(keep_going: bool) -> None:
    host = _Host()
    host.dead = {"g-2"}
    if keep_going:
        assert _run(host, keep_going=True) == (["g-1", "g-3", "g-4"], ["g-2"])
        assert host.running == {"g-1", "g-3", "g-4"}
    else:
        with pytest.raises(GuestFailed, match="QEMU of g-2 ended before"):
            _run(host)
        assert host.running == set()


def test_a_bug_is_raised_as_it_is() -> None:
    host = _Host({"g-1": ZeroDivisionError("ours")})
    with pytest.raises(ZeroDivisionError):
        _run(host)
    assert host.running == host.handed_out == set()


@pytest.mark.parametrize("keep_going", [False, True])
def test_cancelled_it_leaves_none(keep_going: bool) -> None:
    host = _Host()

    async def start(name: str, batch: Batch) -> GuestRecord:
        if name == "g-2":
            await asyncio.Event().wait()
        return await host.start(name, batch)

    async def main() -> None:
        starts = {name: partial(start, name) for name in NAMES}
        everything = start_many(host.as_host(), starts, keep_going=keep_going)
        task = asyncio.create_task(everything)
        await host.ready.get()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert host.running == set()


def test_errors_of_ours_only_are_failures() -> None:
    host = _Host({"g-3": GuestFailed("it broke")})
    done = asyncio.run(start_many(host.as_host(), host.starts(), keep_going=True))
    ((name, error),) = done.failures
    assert name == "g-3"
    assert isinstance(error, OnecopyError)


def test_what_the_memory_is_not_enough_for_is_not_begun() -> None:
    host = _Host()
    with pytest.raises(InsufficientResources):
        asyncio.run(start_many(host.as_host(), host.starts(), each=1 << 60))
    assert host.begun == set()


@pytest.mark.parametrize("keep_going", [False, True])
def test_memory_that_goes_meanwhile(monkeypatch: pytest.MonkeyPatch, keep_going: bool) -> None:
    host = _Host()

    def require(each: int, count: int = 1) -> None:
        if count == 1 and len(host.running) == 2:
            raise InsufficientResources("memory", needed=each, available=0)

    monkeypatch.setattr(admission, "require", require)
    monkeypatch.setattr(os, "cpu_count", lambda: 0.5)  # one at a time
    everything = start_many(host.as_host(), host.starts(), keep_going=keep_going, each=MIB)
    if keep_going:
        assert [name for name, _ in asyncio.run(everything).failures] == NAMES[2:]
        assert host.running == set(NAMES[:2])
    else:
        with pytest.raises(InsufficientResources):
            asyncio.run(everything)
        assert host.running == set()


def test_names() -> None:
    assert names_for("sys", "web", 1) == ["web"]
    assert names_for("sys", "web", 3) == ["web-1", "web-2", "web-3"]
    made = names_for("my_app.v2", None, 3)
    assert len(set(made)) == 3
    assert all(name.startswith("my-app-v2-") for name in made)
    assert names_for("sys", None, 1) != names_for("sys", None, 1)


@pytest.mark.parametrize("name", ["", "Web", "a.b", "a_b", "-a", "a" * 64])
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidInput):
        names_for("sys", name, 1)


def test_a_name_too_long_for_its_number() -> None:
    assert names_for("sys", "a" * 63, 1) == ["a" * 63]
    with pytest.raises(InvalidInput):
        names_for("sys", "a" * 62, 2)
