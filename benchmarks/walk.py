"""Counts the modules that one start of a clone enters, and how often it returns to one.

    python -m benchmarks.walk SYSTEM

It traces the second start of a process, so that imports are excluded. The first instruction of each
call counts, not the resumption of a coroutine. Work in a thread that the start waits for runs in
the traced thread. Background helpers and the sweep at the start of each command are excluded. Not
here: times (starts.py).
"""

from __future__ import annotations

import argparse
import asyncio
import dis
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import onecopy
from onecopy.aio import Host

_ROOT = Path(onecopy.__file__).parent
_INNER = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
_RESUME = dis.opmap["RESUME"]


@dataclass(frozen=True, slots=True)
class Walk:
    """The modules in the order of their calls, without direct repetitions."""

    steps: tuple[str, ...]

    @property
    def modules(self) -> int:
        """The number of different modules."""
        return len(set(self.steps))

    @property
    def returns(self) -> int:
        """The number of returns to a module that was left before."""
        return len(self.steps) - self.modules

    def within(self, package: str) -> Walk:
        """Return the walk within a package."""
        return walk(step for step in self.steps if f"{step}.".startswith(f"{package}."))


def walk(calls: Iterable[str]) -> Walk:
    """Return the walk for the modules of all calls."""
    return Walk(tuple(module for module, _ in groupby(calls)))


@dataclass(slots=True)
class Tracer:
    """A profile function that records the module of each call."""

    calls: list[str] = field(default_factory=list)

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and begins(frame) and (module := _module(frame.f_code.co_filename)):
            self.calls.append(module)


def begins(frame: FrameType) -> bool:
    """Return whether a frame starts, and does not resume (dis, RESUME).

    A comprehension counts as part of its function: Python 3.12 makes no frame for it.
    """
    if frame.f_code.co_name in _INNER:
        return False
    code, at = frame.f_code.co_code, frame.f_lasti
    return at < 0 or code[at] != _RESUME or not code[at + 1] & 3


_known: dict[str, str] = {}


def _module(filename: str) -> str:
    """Return the module of one of onecopy's files; "" for any other file."""
    found = _known.get(filename)
    if found is None:
        path = Path(filename)
        inside = path.is_relative_to(_ROOT)
        parts = path.relative_to(_ROOT).with_suffix("").parts if inside else ()
        found = _known[filename] = ".".join(("onecopy", *parts)) if inside else ""
    return found


async def _inline(work: Callable[..., Any], *args: Any) -> Any:
    return work(*args)


async def trace(system: str) -> Walk:
    """Start two clones, and trace the second until it is ready."""
    tracer = Tracer()
    async with Host() as host:
        async with host.start(system, overcommit=True):
            pass
        start = host.start(system, overcommit=True)
        with (
            patch.object(asyncio, "to_thread", _inline),
            patch.object(Host, "_sweep", lambda self: self._require_open()[0]),
        ):
            sys.setprofile(tracer)
            try:
                await start.__aenter__()
            finally:
                sys.setprofile(None)
        await start.__aexit__(None, None, None)
    return walk(tracer.calls)


def print_walk(found: Walk, say: Callable[[str], None] = print) -> None:
    """Print the figures, and the steps in guest/."""
    guest = found.within("onecopy.guest")
    for name, one in (("onecopy.guest", guest), ("onecopy", found)):
        say(f"{name}: {one.modules} modules, {one.returns} returns")
    say(" > ".join(step.removeprefix("onecopy.guest.") for step in guest.steps))


def main() -> None:
    """Trace the start of a clone of a saved system in the store."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.walk", description=__doc__)
    parser.add_argument("system", help="a saved system in the store of onecopy (ONECOPY_HOME)")
    print_walk(asyncio.run(trace(parser.parse_args().system)))


if __name__ == "__main__":
    main()
