"""`top` on a terminal: it shows the guests, reads keys, and restores the terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Iterator

import pytest

from tests.command import ONECOPY
from tests.vm.conftest import Clones

#: Seconds after which something has not come.
STUCK = 60


class Screen:
    """A terminal of 30 lines with `onecopy top` on it."""

    def __init__(self, *args: str) -> None:
        self.ours, self.theirs = pty.openpty()
        termios.tcsetwinsize(self.theirs, (30, 160))
        self.before = termios.tcgetattr(self.theirs)
        self.process = subprocess.Popen(
            [ONECOPY, "top", "--interval", "0.5", *args],
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            env=os.environ | {"TERM": "xterm"},
            start_new_session=True,
        )

    def type(self, key: str) -> None:
        os.write(self.ours, key.encode())

    def wait_for(self, *texts: str) -> str:
        """What was drawn until all ``texts`` were."""
        drawn, deadline = "", time.monotonic() + STUCK
        while not all(text in drawn for text in texts):
            assert time.monotonic() < deadline, drawn
            if select.select([self.ours], [], [], 1)[0]:
                drawn += os.read(self.ours, 1 << 16).decode(errors="replace")
        return drawn

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def screen() -> Iterator[Screen]:
    shown = Screen()
    yield shown
    shown.close()


def test_on_a_terminal(clones: Clones, screen: Screen) -> None:
    names = sorted(guest.name for guest in clones(2))
    screen.wait_for("GUEST", "sorted by cpu", "SHARED FILE", "RAM of saved systems", *names)
    screen.type("n")
    drawn = screen.wait_for("sorted by name", "RAM of saved systems")
    first, second = (drawn.rindex(name) for name in names)
    assert first < second
    (more,) = clones(1)
    screen.wait_for(more.name)
    screen.type("q")
    assert screen.process.wait(STUCK) == 0
    assert termios.tcgetattr(screen.theirs) == screen.before


def test_interrupted(screen: Screen) -> None:
    screen.wait_for("GUEST")
    os.kill(screen.process.pid, signal.SIGINT)
    assert screen.process.wait(STUCK) == 130
    assert termios.tcgetattr(screen.theirs) == screen.before


def test_without_a_terminal(clones: Clones) -> None:
    names = {guest.name for guest in clones(2)}
    argv = [ONECOPY, "top", "--interval", "0.5", "--sort", "own"]
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=STUCK
    )
    assert done.returncode == 0, done.stderr
    rows = {cells[0]: cells for line in done.stdout.splitlines() if (cells := line.split())}
    for name in names:
        assert rows[name][2].endswith("%") and float(rows[name][3]) > 1
