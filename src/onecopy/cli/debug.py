"""`onecopy --debug`: prints the steps of a command on standard error.

It prints one line for each step, each program that is started, and each QMP message:

    onecopy: debug: +0.052 program argv="qemu-img info disk.raw" cwd="/"

An audit hook of Python (PEP 578) reports programs, and the logger of qemu.qmp reports messages. So
other modules do not depend on this file, and it costs nothing when it is off. The number and length
of lines are limited. Lines have no environment, standard input, shell command or kernel command
line, because these may contain secrets.
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

#: The most characters of one value, and the most lines of one command.
VALUE_LIMIT, LINE_LIMIT = 1000, 10_000
#: Arguments that are followed by a user's own text.
_USERS_OWN = ("-c", "-append")
_HIDDEN = "[...]"

_logger = logging.getLogger("onecopy")
_start = time.monotonic()
_on = False


def enable() -> None:
    """Print the steps of this process on standard error from now on."""
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
    # Errors then print a traceback as well (cli/output.py).
    os.environ["ONECOPY_DEBUG"] = "1"
    event("onecopy", version=__version__, python=sys.version.split()[0], uid=os.geteuid())


def event(kind: str, **fields: object) -> None:
    """Write one line with at most VALUE_LIMIT characters of each field."""
    _logger.debug(kind, extra={"fields": fields})


def step(text: str) -> None:
    """Write one step of a command's progress."""
    event("step", text=text)


class _Line(logging.Formatter):
    """Formats a record as a line: fields as KEY=VALUE, with values as JSON strings."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = getattr(record, "fields", {})
        kind = record.getMessage()
        if record.name != _logger.name:  # A QMP message.
            fields = {"message": " ".join(kind[4:].split())}
            kind = "qmp-sent" if kind.startswith("-->") else "qmp-received"
        passed = time.monotonic() - _start
        told = "".join(f" {key}={_format_value(value)}" for key, value in fields.items())
        return f"onecopy: debug: +{passed:.3f} {kind}{told}"


class _Bound(logging.Filter):
    """Passes only messages of qemu.qmp, and at most LINE_LIMIT lines in all."""

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


def _format_value(value: object) -> str:
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
