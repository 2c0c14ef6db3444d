"""What guests ask for, and are answered, as lines of text (images/files/onecopy-segment).

A request is ``ID VERB ARGUMENTS...``, an answer ``ID item TEXT`` any number of times, then ``ID ok
TEXT`` or ``ID error ERROR EXIT-CODE TEXT``. Guests are not trusted: whatever they send becomes a
`Request` or a `MalformedRequest`, and takes no more memory than a line. Not here: the port
(service.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from onecopy.errors import InvalidInput, OnecopyError

#: Bytes that a line may have.
LIMIT = 1024
_ID = re.compile(r"[0-9a-f]{1,32}")
#: Verb -> how many arguments it takes.
VERBS = {"load": 3, "loaded": 2, "failed": 2, "unload": 1, "find": 1, "list": 0}


class Request(msgspec.Struct, frozen=True):
    """One request; its arguments are as many as the verb takes, and printable ASCII."""

    id: str
    verb: str
    arguments: tuple[str, ...] = ()

    def line(self) -> bytes:
        """As it goes over the port."""
        return (" ".join((self.id, self.verb, *self.arguments)) + "\n").encode()


class MalformedRequest(msgspec.Struct, frozen=True):
    """Something that is no request; ``id`` is - if it had none."""

    why: str
    id: str = "-"


class Lines:
    """Cuts what comes into requests, keeping at most one line."""

    def __init__(self) -> None:
        self._rest = b""
        self._skipping = False

    def feed(self, data: bytes) -> Iterator[Request | MalformedRequest]:
        """What is complete with ``data``; raises nothing."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if self._skipping:
                # The end of a line that was given up already.
                self._skipping = False
            else:
                yield parse(line)
        if len(self._rest) > LIMIT:
            if not self._skipping:
                yield MalformedRequest(f"a line has more than {LIMIT} bytes")
            self._rest, self._skipping = b"", True


def parse(line: bytes) -> Request | MalformedRequest:
    """One line, without its end."""
    if len(line) > LIMIT:
        return MalformedRequest(f"a line has more than {LIMIT} bytes")
    try:
        text = line.decode("ascii")
    except UnicodeDecodeError:
        return MalformedRequest("a request is printable ASCII")
    if not text.isprintable():
        return MalformedRequest("a request is printable ASCII")
    id_, *words = text.split(" ")
    if not _ID.fullmatch(id_):
        return MalformedRequest("a request begins with an ID of up to 32 hexadecimal digits")
    if not words or words[0] not in VERBS:
        return MalformedRequest(f"the requests are {', '.join(VERBS)}", id_)
    if len(words) - 1 != VERBS[words[0]] or "" in words:
        return MalformedRequest(f"{words[0]} takes {VERBS[words[0]]} arguments", id_)
    return Request(id_, words[0], tuple(words[1:]))


def mountpoint(text: str) -> str:
    """Where a guest wants a segment; "" for nowhere."""
    return "" if text == "-" else text


def exclusive(text: str) -> bool:
    """Whether a guest wants a copy of its own; raise InvalidInput."""
    if text not in ("shared", "exclusive"):
        raise InvalidInput("a segment is loaded shared or exclusive")
    return text == "exclusive"


def ok(id_: str, text: str = "") -> bytes:
    """The last line of an answer."""
    return _line(id_, "ok", text)


def item(id_: str, text: str) -> bytes:
    """One line of an answer."""
    return _line(id_, "item", text)


def error(id_: str, error_id: str, exit_code: int, text: str) -> bytes:
    """The answer to what cannot be done."""
    return _line(id_, "error", f"{error_id} {exit_code} {text}")


def refusal(id_: str, refused: OnecopyError, told: tuple[type[OnecopyError], ...]) -> bytes:
    """The answer to what the host refuses. Only errors in ``told`` are told in their own words:
    the others may speak of what is the host's own.
    """
    text = refused.message if isinstance(refused, told) else "the host could not do it"
    return error(id_, refused.id, refused.exit_code, text)


def _line(id_: str, what: str, text: str) -> bytes:
    flat = "".join(char if char.isprintable() else " " for char in text)
    return f"{id_} {what} {flat}".rstrip().encode("ascii", "replace")[: LIMIT - 1] + b"\n"
