"""The line protocol between guests and `onecopy serve` (images/files/onecopy-segment).

A request is ``ID VERB ARGUMENTS...``. An answer is any number of lines ``ID item TEXT``, then
``ID ok TEXT`` or ``ID error ERROR EXIT-CODE TEXT``. Guests are not trusted. Any input becomes a
`Request` or a `MalformedRequest`, and takes no more memory than one line. Not here: the port
(service.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from onecopy.errors import InvalidInput, OnecopyError

#: The longest line in bytes.
LIMIT = 1024
_ID = re.compile(r"[0-9a-f]{1,32}")
#: Verb -> number of its arguments.
VERBS = {"load": 3, "loaded": 2, "failed": 2, "unload": 1, "find": 1, "list": 0}


class Request(msgspec.Struct, frozen=True):
    """A request; its arguments are printable ASCII, and their number matches the verb."""

    id: str
    verb: str
    arguments: tuple[str, ...] = ()

    def line(self) -> bytes:
        """Encode the request as a line."""
        return (" ".join((self.id, self.verb, *self.arguments)) + "\n").encode()


class MalformedRequest(msgspec.Struct, frozen=True):
    """A line that is not a request; ``id`` is "-" if it has none."""

    why: str
    id: str = "-"


class Lines:
    """Splits a stream into requests, and keeps at most one line."""

    def __init__(self) -> None:
        self._rest = b""
        self._skipping = False

    def feed(self, data: bytes) -> Iterator[Request | MalformedRequest]:
        """Yield the requests that ``data`` completes; raise nothing."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if self._skipping:
                # The rest of a line that was rejected already.
                self._skipping = False
            else:
                yield parse(line)
        if len(self._rest) > LIMIT:
            if not self._skipping:
                yield MalformedRequest(f"a line has more than {LIMIT} bytes")
            self._rest, self._skipping = b"", True


def parse(line: bytes) -> Request | MalformedRequest:
    """Parse a line without its newline."""
    if len(line) > LIMIT:
        return MalformedRequest(f"a line has more than {LIMIT} bytes")
    try:
        text = line.decode("ascii")
    except UnicodeDecodeError:
        return MalformedRequest("a request must be printable ASCII")
    if not text.isprintable():
        return MalformedRequest("a request must be printable ASCII")
    id_, *words = text.split(" ")
    if not _ID.fullmatch(id_):
        return MalformedRequest("a request must begin with an ID of 1 to 32 hexadecimal digits")
    if not words or words[0] not in VERBS:
        return MalformedRequest(f"the requests are {', '.join(VERBS)}", id_)
    if len(words) - 1 != VERBS[words[0]] or "" in words:
        return MalformedRequest(f"{words[0]} takes {VERBS[words[0]]} arguments", id_)
    return Request(id_, words[0], tuple(words[1:]))


def mountpoint(text: str) -> str:
    """Decode the mount point of a request; "" for none."""
    return "" if text == "-" else text


def exclusive(text: str) -> bool:
    """Decode whether a guest wants its own copy; raise InvalidInput."""
    if text not in ("shared", "exclusive"):
        raise InvalidInput(f"{text!r} is neither shared nor exclusive")
    return text == "exclusive"


def ok(id_: str, text: str = "") -> bytes:
    """Encode the last line of a successful answer."""
    return _line(id_, "ok", text)


def item(id_: str, text: str) -> bytes:
    """Encode an item of an answer."""
    return _line(id_, "item", text)


def error(id_: str, error_id: str, exit_code: int, text: str) -> bytes:
    """Encode the answer to a request that failed."""
    return _line(id_, "error", f"{error_id} {exit_code} {text}")


def refusal(id_: str, refused: OnecopyError, told: tuple[type[OnecopyError], ...]) -> bytes:
    """Encode the answer to a request that the host refuses.

    Only errors of the classes ``told`` pass on their message. Others may describe the host.
    """
    text = refused.message if isinstance(refused, told) else "the host could not do it"
    return error(id_, refused.id, refused.exit_code, text)


def _line(id_: str, what: str, text: str) -> bytes:
    flat = "".join(char if char.isprintable() else " " for char in text)
    return f"{id_} {what} {flat}".rstrip().encode("ascii", "replace")[: LIMIT - 1] + b"\n"
