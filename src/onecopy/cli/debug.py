"""`onecopy --debug`: what a command does, step by step, on standard error.

One line for each step, each program that is started, and each QMP message:

    onecopy: debug: +0.052 program argv="qemu-img info disk.raw" cwd="/"

An audit hook of Python (PEP 578) sees programs, and the logger of qemu.qmp sees messages. So the
other rooms know nothing of this file, and it costs nothing when it is off. Lines are bounded in
length and number. They hold no environment, standard input, shell command or kernel command line:
these may hold secrets.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from onecopy import __version__
from onecopy.printable import printable

#: Characters of one value, and lines of one command.
VALUE_LIMIT, LINE_LIMIT = 1000, 10_000
#: What follows these in a command line is a user's own text.
_USERS_OWN = ("-c", "-append")
_HIDDEN = "[...]"

_logger = logging.getLogger("onecopy")
_start = time.monotonic()
_on = False


def enable() -> None:
    """Write what happens from now on to standard error, until the process ends."""
    global _on
    if _on:
        return
    _on = True
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line())
    handler.addFilter(_Bound())
    _logger.addHandler(handler)
    _logger.setLevel(logging.DEBUG)
    _logger.propagate = False
    messages = logging.getLogger("qemu.qmp")
    messages.addHandler(handler)
    messages.setLevel(logging.DEBUG)
    messages.propagate = False
    sys.addaudithook(_audit)
    # So that errors show where they come from, too (cli/output.py).
    os.environ["ONECOPY_DEBUG"] = "1"
    event("onecopy", version=__version__, python=sys.version.split()[0], uid=os.geteuid())


def event(kind: str, **fields: object) -> None:
    """Write one line; of each field at most VALUE_LIMIT characters."""
    _logger.debug(kind, extra={"fields": fields})


def step(text: str) -> None:
    """Write what a command tells of its progress."""
    event("step", text=text)


class _Line(logging.Formatter):
    """From a record to a line: fields as KEY=VALUE, with values as JSON has strings."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = getattr(record, "fields", {})
        kind = record.getMessage()
        if record.name != _logger.name:  # a message of QMP
            fields = {"message": " ".join(kind[4:].split())}
            kind = "qmp-sent" if kind.startswith("-->") else "qmp-received"
        passed = time.monotonic() - _start
        told = "".join(f" {key}={_shown(value)}" for key, value in fields.items())
        return f"onecopy: debug: +{passed:.3f} {kind}{told}"


class _Bound(logging.Filter):
    """Of qemu.qmp only its messages, and no more than LINE_LIMIT lines in all."""

    def __init__(self) -> None:
        super().__init__()
        self._left = LINE_LIMIT
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name != _logger.name and record.getMessage()[:4] not in ("--> ", "<-- "):
            return False
        with self._lock:
            self._left -= 1
            if self._left == 0:
                record.msg, record.args = "cut", ()
                record.name, record.fields = _logger.name, {"lines": LINE_LIMIT}
            return self._left >= 0


def _shown(value: object) -> str:
    text = str(value)
    if len(text) > VALUE_LIMIT:
        half = VALUE_LIMIT // 2
        text = f"{text[:half]}{_HIDDEN}{text[-half:]}"
    return json.dumps(printable(text), ensure_ascii=False) if isinstance(value, str) else text


def _audit(name: str, args: tuple[Any, ...]) -> None:
    if name == "subprocess.Popen":
        _, argv, cwd, _ = args
        words = [argv] if isinstance(argv, str | bytes | os.PathLike) else argv
        event("program", argv=_command_line(words), cwd=os.fspath(cwd) if cwd else "")


def _command_line(argv: Sequence[Any]) -> str:
    import shlex

    words = [os.fsdecode(word) for word in argv]
    hidden = {number + 1 for number, word in enumerate(words) if word in _USERS_OWN}
    return " ".join(
        _HIDDEN if number in hidden else shlex.quote(word) for number, word in enumerate(words)
    )
