"""What a guest says, read as what it should be: typed, bounded, and nothing else.

A guest may have been made to do harm, and so may its QEMU. All that comes from them goes through
here before anything is done with it; what is not as it should be is an error of that one guest.
Not here: how it comes, and when it has to (port_pipe.py, agent.py, monitor.py, guest/exec.py).
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, TypeVar

import msgspec

from onecopy.errors import AgentFailed
from onecopy.printable import printable

T = TypeVar("T")

#: Characters of a guest's words in a message of ours.
_SHOWN = 200
_DECIMAL = re.compile(r"[0-9]{1,18}", re.ASCII)


class Nothing(msgspec.Struct, frozen=True):
    """The answer to what has no answer but that it was done."""


def read(line: bytes, form: type[T], what: str) -> T:
    """Decode a JSON text as ``form``; raise AgentFailed, which calls it ``what``."""
    try:
        return msgspec.json.decode(line, type=form)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise _wrong(what, error) from None


def convert(value: Any, form: type[T], what: str) -> T:
    """The same for what is decoded already."""
    try:
        return msgspec.convert(value, form)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise _wrong(what, error) from None


def _wrong(what: str, error: Exception) -> AgentFailed:
    why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    return AgentFailed(
        f"{what} is not what it should be: {shown(why)}",
        hint="something in the guest does not work, or lies: `onecopy stop` ends it all the same",
    )


def shown(said: str | bytes, limit: int = _SHOWN) -> str:
    """A guest's words for a message: their last ``limit`` characters, on one line, printable."""
    text = said.decode(errors="replace") if isinstance(said, bytes) else said
    text = printable(" ".join(text[-4 * limit :].split()))
    return text if len(text) <= limit else f"...{text[-limit:]}"


def decimal(said: str | bytes, what: str, *, most: int) -> int:
    """A number from 0 to ``most`` in decimal; raise AgentFailed."""
    text = said.decode(errors="replace").strip() if isinstance(said, bytes) else said
    if not _DECIMAL.fullmatch(text) or int(text) > most:
        raise AgentFailed(f"{what} is {shown(text)!r}, which is no number up to {most}")
    return int(text)


def address(said: str | bytes, what: str) -> str:
    """An IPv4 address; raise AgentFailed."""
    text = said.decode(errors="replace").strip() if isinstance(said, bytes) else said
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise AgentFailed(f"{what} is {shown(text)!r}, which is no IPv4 address") from None
