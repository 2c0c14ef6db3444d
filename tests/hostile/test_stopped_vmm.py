"""A QEMU that does not answer, and one that is killed: each wait ends, and no other guest's begins.

SIGSTOP is the hardest of them: its sockets and pipes are open, and nobody reads. Not here: agents
that do not answer (test_lying_guest.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecopy.errors import AgentFailed, GuestFailed
from onecopy.guest.exec import run_captured
from onecopy.guest.resume import go_on
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.vmm.monitor import connect
from tests.command import ONECOPY, onecopy
from tests.vm.conftest import Clones, RunIn

#: Seconds that a command is given, those that it may take beyond, and what would be stuck.
ASKED, BEYOND, STUCK = 3.0, 2.0, 120.0


@contextlib.contextmanager
def stopped(guest: GuestRecord) -> Iterator[None]:
    """Its QEMU does nothing meanwhile."""
    os.kill(guest.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(guest.pid, signal.SIGCONT)


def started() -> float:
    """Seconds that a command takes here and now to do nothing."""
    began = time.monotonic()
    onecopy("exec", "nobody", "true", code=None)
    return time.monotonic() - began


@contextlib.contextmanager
def running(*args: object) -> Iterator[subprocess.Popen[bytes]]:
    """A command of ours, which is gone at the end."""
    argv = [ONECOPY, *map(str, args)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            process.kill()


def test_exec_takes_no_more_than_its_time(host: Runtime, clones: Clones, run_in: RunIn) -> None:
    guest, other = clones(2)
    with stopped(guest):
        began = time.monotonic()
        with pytest.raises((AgentFailed, GuestFailed), match="did not answer within 3 s"):
            asyncio.run(run_captured(host.run / guest.name, ["true"], timeout=ASKED))
        assert time.monotonic() - began < ASKED + BEYOND
        # A command on another guest, and one on all, wait for nothing.
        assert run_in(other, "echo", "on").stdout == b"on\n"
        assert {guest.name, other.name} <= set(onecopy("ps").stdout.split())
    # It is as good as before, whatever was left in its pipes and ports.
    assert run_in(guest, "echo", "on").stdout == b"on\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_ends_a_command(clones: Clones, number: int) -> None:
    (guest,) = clones(1)
    with stopped(guest), running("exec", guest.name, "true") as command:
        time.sleep(started() + 1)
        assert command.poll() is None
        began = time.monotonic()
        command.send_signal(number)
        assert command.wait(STUCK) == 130
        assert time.monotonic() - began < BEYOND + started()


def test_stop_ends_it(host: Runtime, clones: Clones) -> None:
    guest, other = clones(2)
    with stopped(guest):
        done = onecopy("stop", guest.name, other.name)
        assert done.stdout.splitlines() == [
            f"{guest.name} was ended: it did not answer",
            f"{other.name} shut down",
        ]
        assert done.stderr == ""
    assert not {guest.name, other.name} & {each.name for each in host.guests()}


def test_a_guest_left_paused_holds_up_nobody(host: Runtime, clones: Clones, run_in: RunIn) -> None:
    """A command that was killed left it standing still, and then its QEMU stops, too."""
    (guest,) = clones(1)
    folder = host.run / guest.name
    (folder / "paused").touch()
    with stopped(guest):
        began = time.monotonic()
        go_on([folder])
        assert time.monotonic() - began < BEYOND
        # It is still to go on, when that can be.
        assert (folder / "paused").exists()
    # The next commands ask again after a while.
    os.utime(folder / "paused", (0, 0))
    go_on([folder])
    assert not (folder / "paused").exists()
    assert run_in(guest, "true").exit_code == 0


def test_a_killed_qemu_ends_each_wait(host: Runtime, clones: Clones, tmp_path: Path) -> None:
    """Commands that wait for a QEMU that does nothing, without a deadline of their own."""
    guests = clones(4)
    commands = [
        ("exec", guests[0].name, "true"),
        ("cp", f"{guests[1].name}:/usr", tmp_path / "copy"),
        ("cp", __file__, f"{guests[2].name}:/"),
        ("save", "--from", guests[3].name, "never"),
    ]
    with contextlib.ExitStack() as ends:
        for guest in guests:
            ends.enter_context(stopped(guest))
        begun = [ends.enter_context(running(*each)) for each in commands]
        time.sleep(started() + 2)
        assert [each.poll() for each in begun] == [None] * 4
        killed = time.monotonic()
        for guest in guests:
            os.kill(guest.pid, signal.SIGKILL)
        codes = [each.wait(STUCK) for each in begun]
        assert time.monotonic() - killed < BEYOND + started()
        for each in begun:
            assert each.stdout
            assert b"Traceback" not in each.stdout.read()
    assert codes[0] == 125
    assert set(codes[1:]) <= {GuestFailed.exit_code, AgentFailed.exit_code}
    assert list(tmp_path.iterdir()) == []


def test_a_killed_qemu_ends_what_is_under_way(
    host: Runtime, clones: Clones, tmp_path: Path
) -> None:
    guest, other = clones(2)
    with (
        running("cp", f"{guest.name}:/usr", tmp_path / "copy") as out,
        running("exec", "-i", other.name, "sleep", "1000") as program,
    ):
        time.sleep(started() + 2)
        assert program.poll() is None
        began = time.monotonic()
        os.kill(guest.pid, signal.SIGKILL)
        os.kill(other.pid, signal.SIGKILL)
        assert program.wait(STUCK) == 125
        assert out.wait(STUCK) in (0, GuestFailed.exit_code, AgentFailed.exit_code)
        assert time.monotonic() - began < BEYOND + started()


def test_a_monitor_that_is_taken_is_told(host: Runtime, clones: Clones) -> None:
    """QEMU serves one client: who has it does not let others wait for ever."""
    (guest,) = clones(1)
    path = host.run / guest.name / "monitor.sock"

    async def both() -> None:
        from onecopy.deadline import Deadline

        async with connect(path.parent) as first:
            with pytest.raises(GuestFailed, match="QEMU did not answer within"):
                async with connect(path.parent, Deadline.after(0.5)):
                    pass
            assert await first.execute("query-version")

    asyncio.run(both())
