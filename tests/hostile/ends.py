"""One process that has loaded every command, and whose children run them in broken surroundings.

A command's imports take ten times as long as what it does here. The children have real descriptors,
limits and folders, and the streams that Python makes of those when it starts.
"""

from __future__ import annotations

import io
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

_DEADLINE = 20.0


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    told: str
    out: bytes = b""


def _close(*fds: int) -> Callable[[], None]:
    def set_up() -> None:
        for fd in fds:
            os.close(fd)

    return set_up


def _full(*fds: int) -> Callable[[], None]:
    def set_up() -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        for fd in fds:
            os.dup2(full, fd)
        os.close(full)

    return set_up


def _unread() -> None:
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.close(reading)
    os.close(writing)


def _nowhere() -> None:
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    Path(folder).rmdir()


def _few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))


def _ascii() -> None:
    os.environ["PYTHONIOENCODING"] = "ascii:strict"


#: Name -> how the child is set up.
_SETUPS: dict[str, Callable[[], None]] = {
    "closed": _close(0, 1, 2),
    "closed-input": _close(0),
    "closed-output": _close(1),
    "closed-messages": _close(2),
    "full": _full(1),
    "all-full": _full(1, 2),
    "unread": _unread,
    "nowhere": _nowhere,
    "few-files": _few_files,
    "ascii": _ascii,
}
#: Name -> the exit code of a command that does nothing but print.
CONDITIONS = dict.fromkeys(_SETUPS, 0) | {
    "closed": 23,
    "closed-output": 23,
    "full": 23,
    "all-full": 23,
    "unread": 141,
}


class Forked:
    """A server of cases, for the store in ``home``."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.ends"],
            env={**os.environ, "ONECOPY_HOME": str(home)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, condition: str, words: Sequence[str]) -> Ended:
        """Run one command."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(msgspec.json.encode((condition, words)) + b"\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._process.stdout.readline(), type=Ended)

    def close(self) -> None:
        """End the server."""
        self._process.communicate()


def _serve() -> None:
    import importlib

    from onecopy import cli

    for name in cli.COMMANDS:
        importlib.import_module(f"onecopy.cli.{name}_cmd")
    # What commands import when they run.
    from onecopy.guest.lifecycle import pool  # noqa: F401
    from onecopy.guest.observe import advise, plan  # noqa: F401
    from onecopy.store import Store

    Store()
    for line in sys.stdin.buffer:
        condition, words = msgspec.json.decode(line, type=tuple[str, list[str]])
        ended = _case(condition, words)
        sys.stdout.buffer.write(msgspec.json.encode(ended) + b"\n")
        sys.stdout.buffer.flush()


def _case(condition: str, words: list[str]) -> Ended:
    with tempfile.TemporaryFile() as told:
        child = os.fork()
        if not child:
            _become(condition, words, told.fileno())
        pidfd = os.pidfd_open(child)
        try:
            if not select.select([pidfd], [], [], _DEADLINE)[0]:
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        finally:
            os.close(pidfd)
        told.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return Ended(code, told.read().decode(errors="replace"))


def _become(condition: str, words: list[str], told: int) -> None:
    """Be a command that was started so, from here to the end of the process."""
    code = 99
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(told, 2)
        os.closerange(3, 64)
        _SETUPS[condition]()
        encoding = "ascii" if condition == "ascii" else "utf-8"
        for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
            stream = _stream(fd, mode, encoding)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        from onecopy.cli import main

        code = main(words)
        sys.stdout.flush()
    finally:
        os._exit(code)


def _stream(fd: int, mode: str, encoding: str) -> io.TextIOWrapper | None:
    try:
        return open(fd, mode, encoding=encoding, closefd=False)  # type: ignore[return-value]
    except OSError:
        return None


if __name__ == "__main__":
    _serve()
