"""The walk of a start: what counts as entering a module, and as going back to one."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from benchmarks import walk
from onecopy.model import Reference
from onecopy.printable import escape


def test_modules_and_returns() -> None:
    found = walk.walk(["o.a", "o.a", "o.b.c", "o.a", "o.bd", "o.b.c", "o.b.c"])
    assert found.steps == ("o.a", "o.b.c", "o.a", "o.bd", "o.b.c")
    assert (found.modules, found.returns) == (3, 2)
    # What lies between is left out, and what is then side by side is one step.
    assert found.within("o.b").steps == ("o.b.c", "o.b.c")


def test_calls_of_onecopy_are_noted() -> None:
    tracer = walk.Tracer()
    sys.setprofile(tracer)
    try:
        Reference.parse("name:1")
        Path("/").joinpath("not", "ours")
        escape("text")
    finally:
        sys.setprofile(None)
    assert walk.walk(tracer.calls).steps == ("onecopy.model", "onecopy.printable")


def test_who_goes_on_is_not_entered_again() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        yield 2

    async def waits() -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    begun: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        ours = frame.f_code in (numbers.__code__, waits.__code__)
        if event == "call" and ours and walk.begins(frame):
            begun.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        asyncio.run(waits())
        list(numbers())
    finally:
        sys.setprofile(None)
    assert begun == ["waits", "numbers"]
