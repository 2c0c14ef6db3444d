"""Validate what a guest sends: its type and size must match, and nothing else is accepted.

A guest may be compromised, and so may its QEMU. All their data passes through here before it is
used. Invalid data is an error of that one guest.

Not here: transport and timeouts (port_pipe.py, agent.py, monitor.py, guest/exec.py).
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, TypeVar

import msgspec

from onecopy.errors import AgentFailed
from onecopy.printable import printable

T = TypeVar("T")

#: The number of characters of a guest's text that an error message shows.
_SHOWN_LIMIT = 200
_DECIMAL = re.compile(r"[0-9]{1,18}", re.ASCII)


class Nothing(msgspec.Struct, frozen=True):
    """The empty answer to a command that returns nothing."""


def read(line: bytes, form: type[T], what: str) -> T:
    """Decode JSON as the type ``form``.

    Args:
        what: names the data in the error message.

    Raises:
        AgentFailed: the data is not valid.
    """
    try:
        return msgspec.json.decode(line, type=form)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise _wrong(what, error) from None


def convert(value: Any, form: type[T], what: str) -> T:
    """Convert decoded JSON to the type ``form``; raise like `read`."""
    try:
        return msgspec.convert(value, form)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise _wrong(what, error) from None


def _wrong(what: str, error: Exception) -> AgentFailed:
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    return AgentFailed(
        f"{what} is not valid: {shown(reason)}",
        hint="the guest is faulty or compromised; `onecopy stop` can still end it",
    )


def shown(data: str | bytes, limit: int = _SHOWN_LIMIT) -> str:
    """Make a guest's text safe for a message: its last ``limit`` characters on one line."""
    text = data.decode(errors="replace") if isinstance(data, bytes) else data
    text = printable(" ".join(text[-4 * limit :].split()))
    return text if len(text) <= limit else f"...{text[-limit:]}"


def decimal(data: str | bytes, what: str, *, most: int) -> int:
    """Parse a decimal number from 0 to ``most``.

    Raises:
        AgentFailed: it is not such a number.
    """
    text = data.decode(errors="replace").strip() if isinstance(data, bytes) else data
    if not _DECIMAL.fullmatch(text) or int(text) > most:
        raise AgentFailed(f"{what} is {shown(text)!r}, which is not a number from 0 to {most}")
    return int(text)


def address(data: str | bytes, what: str) -> str:
    """Parse an IPv4 address.

    Raises:
        AgentFailed: it is not an address.
    """
    text = data.decode(errors="replace").strip() if isinstance(data, bytes) else data
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise AgentFailed(f"{what} is {shown(text)!r}, which is not an IPv4 address") from None
