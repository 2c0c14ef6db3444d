"""Measures hundreds of clones at once, by the user's commands, and one more beside them.

Not here: what a clone costs (idle.py), the phases of one start (starts.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import pty
import sys
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.answers import answered
from benchmarks.figures import SETTLE, Spread
from benchmarks.setup import SYSTEM, Setup
from onecopy.errors import GuestFailed
from onecopy.guest.observe.accounts import report_of
from onecopy.guest.observe.plan import measure
from onecopy.linux import process
from onecopy.linux.counters import meminfo
from onecopy.sharing.cross_check import Before, check, look
from onecopy.sharing.forecast import Forecast, Work, forecast
from onecopy.vmm import fork_registry

#: Number of single starts in each measurement.
_ONES = 7
_NAME = "many"
#: The work of clones that `plan` measures.
_ASK = Work("busybox wget -qO- http://127.0.0.1:$PORT/", 80)
#: Seconds for `top` to start, and of its measurement.
_TOP_STARTS, _TOP_RUNS = 10.0, 30.0


@dataclass(frozen=True, slots=True)
class Many:
    """The figures; seconds of whole commands unless stated otherwise."""

    guests: int
    alone: Spread
    """From the request for one clone until it is ready, while no other runs."""
    started: float
    """`run -n N`."""
    answered: float
    """From the requests to idle clones until each has answered over HTTP with its name."""
    beside: Spread
    """As ``alone``, while all others run."""
    ps: Spread
    report: Spread
    top: float
    """CPU seconds per second of `top` on a terminal, once it shows all clones."""
    stopped: float
    """`stop --all`."""
    shut_down: int
    """Clones that shut down in time; the others were killed."""
    available_taken: float
    """Bytes for each: the decrease of MemAvailable when all clones were idle."""
    memory: int
    """Bytes of all idle clones, shared memory included (sharing/cross_check.py, parts)."""
    worked: int
    """As ``memory``, after all clones have answered."""
    planned: Forecast
    """The forecasts of `plan` for ``memory`` and ``started``."""
    planned_worked: Forecast
    """The forecast of `plan` for ``worked``: each measured clone has asked itself."""


async def measure_many(setup: Setup, count: int, tell: Callable[[str], None]) -> Many:
    """Measure ``count`` clones, which must all answer; always end them."""
    before = meminfo.read()
    try:
        tell("a few clones, and what many are planned to take")
        system = setup.host.store.resolve(SYSTEM, "system")
        planned = forecast(await measure(setup.host, system), count)
        worked = forecast(await measure(setup.host, system, work=_ASK), count)
        tell("one clone alone")
        alone = [await _one() for _ in range(_ONES + 1)]
        tell(f"{count} clones")
        at_first = look(fork_registry.pids())
        began = time.monotonic()
        guests = json.loads(await _onecopy("run", *_options(count)))["guests"]
        started = time.monotonic() - began
        await asyncio.sleep(SETTLE)
        idle_memory = _parts(setup, at_first)
        asking = time.monotonic()
        await _all_answer(guests)
        all_answered = time.monotonic() - asking
        await asyncio.sleep(SETTLE)
        now = meminfo.read()
        working = _parts(setup, at_first)
        tell("one more beside them")
        beside = [await _one() for _ in range(_ONES + 1)]
        tell("ps and report")
        ps = [await _timed("ps") for _ in range(3)]
        report = [await _timed("report") for _ in range(3)]
        tell("top")
        top = await _top()
        tell("stopping all")
        stopping = time.monotonic()
        said = await _onecopy("stop", "--all")
        stopped = time.monotonic() - stopping
    finally:
        setup.host.end(*(each for each in setup.host.guests() if each.name.startswith(_NAME)))
    return Many(
        guests=len(guests),
        alone=Spread.of(alone[1:]),
        started=started,
        answered=all_answered,
        beside=Spread.of(beside[1:]),
        ps=Spread.of(ps),
        report=Spread.of(report),
        top=top,
        stopped=stopped,
        shut_down=said.count("shut down"),
        memory=idle_memory,
        worked=working,
        planned=planned,
        planned_worked=worked,
        available_taken=((before.available or 0) - (now.available or 0)) / count,
    )


def _parts(setup: Setup, before: Before) -> int:
    return check(before, report_of(setup.host.guests())).parts


def _options(count: int, name: str = _NAME) -> list[str]:
    return ["-n", str(count), "--name", name, "-p", "0:80", "--json", SYSTEM.name]


async def _one() -> float:
    (guest,) = json.loads(await _onecopy("run", *_options(1, f"{_NAME}-more")))["guests"]
    await _all_answer([guest])
    await _onecopy("stop", "--now", guest["name"])
    return float(guest["start_seconds"])


async def _all_answer(guests: Sequence[dict[str, Any]]) -> None:
    turn = asyncio.Semaphore(os.cpu_count() or 1)

    async def one(guest: dict[str, Any]) -> None:
        ((port, _),) = guest["publish"]
        async with turn:
            await answered(port, guest["name"])

    await asyncio.gather(*map(one, guests))


async def _timed(command: str) -> float:
    began = time.monotonic()
    await _onecopy(command)
    return time.monotonic() - began


async def _top() -> float:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, 160))
    argv = [sys.executable, "-m", "onecopy", "top"]
    top = await asyncio.create_subprocess_exec(*argv, stdin=theirs, stdout=theirs)
    # Read its output, or it would block.
    loop = asyncio.get_running_loop()
    loop.add_reader(ours, os.read, ours, 1 << 16)
    try:
        await asyncio.sleep(_TOP_STARTS)
        before = process.cpu_seconds(top.pid)
        await asyncio.sleep(_TOP_RUNS)
        return (process.cpu_seconds(top.pid) - before) / _TOP_RUNS
    finally:
        loop.remove_reader(ours)
        os.write(ours, b"q")
        await top.wait()
        os.close(ours)
        os.close(theirs)


async def _onecopy(*args: str) -> str:
    """Run a command and return its output; raise GuestFailed if it fails."""
    command = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "onecopy", *args, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await command.communicate()
    if command.returncode:
        raise GuestFailed(f"onecopy {' '.join(args)} failed ({command.returncode})")
    return said.decode()
