"""The lies that a guest's agent is made to tell (liar.py), by name."""

from __future__ import annotations

import base64
import json
from typing import Any

Word = dict[str, Any]
Mode = list[tuple[str, Word]]


def raw(text: bytes, times: int = 1, then: bytes = b"") -> Word:
    """That text as the answer."""
    encoded = base64.b64encode
    return {"raw": encoded(text).decode(), "times": times, "then": encoded(then).decode()}


def line(value: object) -> Word:
    """A JSON line as the answer."""
    return raw(json.dumps(value).encode() + b"\n")


HONEST: Word = {"run": True}
SILENT: Word = {"silent": True}


def always(word: Word) -> Mode:
    """The same to all that is asked."""
    return [("", word)]


def to(command: str, word: Word) -> Mode:
    """A lie to one command; all others are answered honestly."""
    return [(command, word), ("", HONEST)]


def status(value: object) -> Mode:
    """A lie about how a program ended."""
    return to("guest-exec-status", line({"return": value}))


_DEEP = b'{"return": ' + b"[" * 1500 + b"]" * 1500 + b"}\n"
_DEEPER = b'{"error": ' + b'{"desc":' * 60_000 + b"1" + b"}" * 60_001 + b"\n"
_ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202e" + "x" * 10_000

#: What is refused at once.
WRONG: dict[str, Mode] = {
    "a word": always(raw(b"hello\n")),
    "nothing at all": always(raw(b"\n")),
    "a null": always(raw(b"null\n")),
    "a list": always(raw(b"[]\n")),
    "neither": always(raw(b"{}\n")),
    "lists in lists": always(raw(_DEEP)),
    "objects in objects": always(raw(_DEEPER)),
    "error 1": always(line({"error": 1})),
    "error without words": always(line({"error": {}})),
    "words that are a number": always(line({"error": {"desc": 1}})),
    "terminal escapes": always(line({"error": {"desc": _ESCAPES}})),
    "half a surrogate": always(raw(b'{"error": {"desc": "\\ud800"}}\n')),
    "no UTF-8": always(raw(b'{"error": {"desc": "\xff\xfe\xc0"}}\n')),
    "a NUL": always(raw(b'{"return": {"pid": 5\x00}}\n')),
    "5,000 digits": always(raw(b'{"return": {"pid": ' + b"9" * 5000 + b"}}\n")),
    "a pid of 10^30": always(line({"return": {"pid": 10**30}})),
    "a pid of 2^40": always(line({"return": {"pid": 2**40}})),
    "pid -1": always(line({"return": {"pid": -1}})),
    "pid 0": always(line({"return": {"pid": 0}})),
    "a pid that is true": always(line({"return": {"pid": True}})),
    "a pid that is text": always(line({"return": {"pid": "5"}})),
    "half a pid": always(line({"return": {"pid": 0.5}})),
    "NaN": always(raw(b'{"return": {"pid": NaN}}\n')),
    "infinity": always(raw(b'{"return": {"pid": 1e999}}\n')),
    "a null for a result": always(line({"return": None})),
    "many lines": always(raw(b'{"return": 1}\n', 20_000)),
    "2 MB of text": always(raw(b"x" * 512, 4096, b'"}}\n')),
    "a line without end": always({"flood": base64.b64encode(b'{"return": "').decode()}),
    "lines without end": always({"flood": base64.b64encode(b"\n").decode()}),
    "syncs without end": always({"flood": base64.b64encode(b'\xff{"return": 1}\n').decode()}),
    "an exit that is a number": status({"exited": 1, "exitcode": 0}),
    "no word of the exit": status({}),
    "exit code 10^30": status({"exited": True, "exitcode": 10**30}),
    "exit code -1": status({"exited": True, "exitcode": -1}),
    "exit code 256": status({"exited": True, "exitcode": 256}),
    "signal 10^9": status({"exited": True, "signal": 10**9}),
    "an exit code of text": status({"exited": True, "exitcode": "0"}),
}
#: What takes the whole time that was given.
SLOW: dict[str, Mode] = {
    "silence": always(SILENT),
    "half an answer": always(raw(b'{"return": {"pid"')),
    "it never ends": status({"exited": False}),
    "stdout without end": to("guest-exec", {"ports": "stdout"}),
    "stderr without end": to("guest-exec", {"ports": "stderr"}),
}
