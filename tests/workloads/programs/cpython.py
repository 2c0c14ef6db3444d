"""Runs in a guest: modules of CPython's own tests, told as TAP (tap.py).

`cpython.py MODULE...` gives each module a process of its own and prints a line for each test. What
a failed test said goes to standard error.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import unittest
from typing import Any

# mypy: disable-error-code="import-not-found"

#: Seconds that one module may take in a slow guest.
LIMIT = 1500
_COMPLETE = "complete"
#: Open files: guests and a chroot have other limits of their own.
FILES = (1024, 4096)


class Told(unittest.TestResult):
    """Remembers how each test ended; of several ends (subtests, clean-ups) the worst."""

    def __init__(self, err: int) -> None:
        super().__init__()
        self.ended: dict[str, str] = {}
        self._err = err

    def addSuccess(self, test: Any) -> None:  # noqa: N802
        self.ended.setdefault(test.id(), "ok")

    def addExpectedFailure(self, test: Any, err: Any) -> None:  # noqa: ARG002, N802
        self.ended.setdefault(test.id(), "ok")

    def addSkip(self, test: Any, reason: str) -> None:  # noqa: ARG002, N802
        self.ended.setdefault(test.id(), "skip")

    def addUnexpectedSuccess(self, test: Any) -> None:  # noqa: N802
        self.ended[test.id()] = "not ok"

    def addFailure(self, test: Any, err: Any) -> None:  # noqa: N802
        self.ended[test.id()] = "not ok"
        said = "".join(traceback.format_exception(*err)[-6:])
        os.write(self._err, f"{test.id()}: {said}\n".encode(errors="replace"))

    addError = addFailure  # noqa: N815

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:  # noqa: ARG002, N802
        if err is not None:
            self.addFailure(test, err)


def run_module(name: str, results: int, err: int) -> None:
    """Run one module; write a line ``HOW TEST`` for each test to ``results``."""
    from test import support

    support.use_resources = []
    told = Told(err)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        os.chdir(work)
        try:
            module = importlib.import_module(f"test.{name}")
        except unittest.SkipTest:
            told.ended[f"test.{name}"] = "skip"
        else:
            unittest.defaultTestLoader.loadTestsFromModule(module).run(told)
        os.chdir("/")
    own = f"test.{name}."
    lines = [
        # Several modules have the tests of test.fork_wait.
        f"{how} {test if f'{test}.'.startswith(own) else own + test}"
        for test, how in told.ended.items()
    ]
    # A module that exits in the middle has not written the last line.
    os.write(results, "\n".join([*lines, _COMPLETE]).encode())


def child(name: str, results: int) -> None:
    """Become the process of a module, which exits with 0 only if it came to its end."""
    os.setsid()
    err = os.dup(2)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGHUP):
        how = signal.SIG_IGN if number == signal.SIGPIPE else signal.SIG_DFL
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else how)
    resource.setrlimit(resource.RLIMIT_NOFILE, FILES)
    try:
        run_module(name, results, err)
    except BaseException:  # a module that exits did not come to its end
        os.write(err, f"{name}: {traceback.format_exc()}".encode(errors="replace"))
        os._exit(1)
    os._exit(0)


def ends_of(name: str) -> list[tuple[str, str]]:
    """(how, test) pairs of a module; it failed itself if its process did not come to its end."""
    with tempfile.TemporaryFile() as results:
        pid = os.fork()
        if not pid:
            child(name, results.fileno())
        status, deadline = None, time.monotonic() + LIMIT
        while status is None:
            ended, code, used = os.wait4(pid, os.WNOHANG)
            status = code if ended else None
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what it left behind
        results.seek(0)
        lines = results.read().decode().splitlines()
    sys.stderr.write(f"{name}: {used.ru_utime + used.ru_stime:.1f} s, wait status {status}\n")
    if status or not lines or lines.pop() != _COMPLETE:
        lines.append(f"not ok test.{name}: did not come to its end")
    return [(how, line.removeprefix(f"{how} ")) for line in lines for how in _hows(line)]


def _hows(line: str) -> list[str]:
    return [how for how in ("ok", "not ok", "skip") if line.startswith(f"{how} ")]


def main() -> None:
    number = 0
    for name in sys.argv[1:]:
        for how, test in ends_of(name):
            number += 1
            skip = " # SKIP" if how == "skip" else ""
            print(f"{'not ok' if how == 'not ok' else 'ok'} {number} - {test}{skip}", flush=True)
    print(f"1..{number}", flush=True)


main()
