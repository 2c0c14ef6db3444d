"""A short fuzz of every reader of foreign bytes (script/fuzz has the long one)."""

import signal
import time
from pathlib import Path

import pytest

from tests.fuzz import campaign
from tests.fuzz.__main__ import fuzz
from tests.fuzz.campaign import Tally, run
from tests.fuzz.readers import Reader, readers

_SEED = 20261129


@pytest.mark.parametrize("name", readers())
def test_readers_hold(name: str) -> None:
    (tally,) = fuzz(_SEED, [readers()[name]], 300).values()
    assert [failure.line(_SEED) for failure in tally.failures] == []


def _found(reader: Reader, count: int = 40) -> Tally:
    return run(_SEED, reader, count, 2)


def test_the_same_seed_gives_the_same_failures_as_small_as_can_be() -> None:
    def breaks(data: bytes, _: Path) -> None:
        if b"7" in data:
            raise KeyError

    reader = Reader("keys", breaks, [b"1 2 7 4", b"12"])
    one, two = _found(reader), _found(reader)
    assert one.failures and one.failures == two.failures
    assert {failure.data for failure in one.failures} == {b"7"}
    assert all("KeyError" in failure.what for failure in one.failures)


def test_what_is_left_behind_is_found() -> None:
    def leaves(_: bytes, folder: Path) -> None:
        (folder.parent / "left").touch()

    assert {each.what for each in _found(Reader("left", leaves, [b"x"])).failures} == {
        "left 'left' behind"
    }


def test_too_much_memory_is_found() -> None:
    def takes(data: bytes, _: Path) -> None:
        bytearray(4 << 30)

    found = _found(Reader("memory", takes, [b"x"])).failures
    assert found and all("MemoryError" in each.what for each in found)


def test_too_much_time_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def turns(data: bytes, _: Path) -> None:
        while True:
            pass

    def sleeps(data: bytes, _: Path) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
        time.sleep(3600)

    monkeypatch.setattr(campaign, "_CPU", 0.05)
    monkeypatch.setattr(campaign, "_WALL", 0.5)
    (found,) = run(_SEED, Reader("turns", turns, [b"x"]), 1, 1).failures
    assert "of a processor" in found.what
    (found,) = run(_SEED, Reader("sleeps", sleeps, [b"x"]), 1, 1).failures
    assert found.what == "did not come back"


def test_a_reader_that_ends_its_process_is_found() -> None:
    def ends(data: bytes, _: Path) -> None:
        signal.raise_signal(signal.SIGSEGV)

    found = _found(Reader("ends", ends, [b"x"]), 3).failures
    assert [each.number for each in found] == [0, 1, 2]
