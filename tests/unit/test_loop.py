"""The event loop in a thread: results, errors, interrupts; and what `import onecopy` brings."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest

import onecopy
from onecopy.loop import LoopThread


async def _give(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def _fail() -> None:
    raise ZeroDivisionError


def test_many_threads_share_one() -> None:
    before = threading.active_count()
    with LoopThread() as loop, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: loop.run(_give(n)), range(100))) == list(range(100))
        with pytest.raises(ZeroDivisionError):
            loop.run(_fail())
    assert threading.active_count() == before


def test_an_interrupt_waits_until_all_is_undone() -> None:
    undone: list[str] = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(0.05)
            undone.append("it")

    with LoopThread() as loop, pytest.raises(KeyboardInterrupt):
        loop.run(work())
    assert undone == ["it"]


def test_context_managers_see_the_caller_s_errors() -> None:
    seen: list[str] = []

    @asynccontextmanager
    async def manager() -> AsyncIterator[int]:
        try:
            yield 5
        except ZeroDivisionError:
            seen.append("error")
            raise
        finally:
            seen.append("end")

    with LoopThread() as loop:
        with loop.entered(manager()) as value:
            assert (value, seen) == (5, [])
        with pytest.raises(ZeroDivisionError), loop.entered(manager()):
            _ = 1 / 0
    assert seen == ["end", "error", "end"]


def test_it_does_not_wait_for_itself() -> None:
    with LoopThread() as loop:

        async def work() -> None:
            loop.run(_give(1))

        with pytest.raises(RuntimeError, match="a callback"):
            loop.run(work())


def test_the_package_has_what_it_names_and_loads_it_late() -> None:
    script = "import sys, onecopy; print('asyncio' in sys.modules or 'msgspec' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n"
    for name in (*onecopy._PLACES, *onecopy._MODULES):
        assert getattr(onecopy, name).__name__.endswith(name)
        assert name in dir(onecopy)
    with pytest.raises(AttributeError, match="nothing"):
        _ = onecopy.nothing
