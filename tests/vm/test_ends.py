"""Each end of a guest comes within seconds and is reported; `stop` gives programs time to end.

Not here: all ends under all inits (tests/workloads/ends_table.py), the host's records of ended
guests.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence

import pytest

from onecopy import Guest
from onecopy.guest.lifecycle.stop import Ending, Stopped, stop_guests, wait_for_end
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB
from onecopy.store import Artifact
from tests.command import ONECOPY
from tests.vm.conftest import Boot, RunIn
from tests.vm.ends import ASKED, ENDS, FORCED, MINIMAL, POWERED_OFF, STUCK, end_all, wrong
from tests.vm.guests import Guests, save_system

DISK = ["64M:/data"]
#: A program that takes 3 s to end, and its words then.
SLOW = "trap 'sleep 3; echo whole >/data/end; exit' TERM; touch /run/up; while :; do sleep 1; done"
STUBBORN = "trap : TERM; touch /run/up; while :; do sleep 1; done"


def records(guests: Sequence[Guest]) -> list[GuestRecord]:
    return [guest.record for guest in guests]


@pytest.fixture(autouse=True)
def _end_guests(host: Runtime) -> Iterator[None]:
    yield
    host.end(*host.guests())


@pytest.fixture(scope="module")
def busybox(host: Runtime, busybox_init_root: Artifact) -> Artifact:
    """Saved system: busybox's init."""
    return save_system("busybox-saved", busybox_init_root, memory="128M")


@pytest.mark.parametrize("init", ["minimal", "busybox"])
def test_each_end_of_clones(
    host: Runtime, guests: Guests, init: str, request: pytest.FixtureRequest
) -> None:
    expected = ENDS[init]
    clones = guests.clone(request.getfixturevalue(init), len(expected), name="end")
    assert wrong(end_all(host, records(clones), list(expected)), expected) == []


def test_ends_under_systemd(host: Runtime, guests: Guests, systemd_system: Artifact) -> None:
    expected = {key: ENDS["systemd"][key] for key in ("systemctl reboot", "halt -f")}
    two = guests.clone(systemd_system, 2)
    assert wrong(end_all(host, records(two), list(expected)), expected) == []


def test_a_booted_guest_halts(host: Runtime, boot: Boot, busybox_root: Artifact) -> None:
    guest = boot(busybox_root, memory=128 * MIB, command="")
    assert wrong(end_all(host, [guest], ["halt"]), ASKED) == []


def test_a_command_that_ends_leaves_the_others_their_time(
    host: Runtime, guests: Guests, minimal: Artifact, run_in: RunIn
) -> None:
    (guest,) = records(guests.clone(minimal, name="left", disks=DISK))
    begin(run_in, guest, SLOW)
    (command,) = MINIMAL
    assert wrong(end_all(host, [guest], [command]), MINIMAL) == []
    host.end(guest)
    (again,) = records(guests.clone(minimal, name="left", disks=DISK))
    assert run_in(again, "cat", "/data/end").stdout == b"whole\n"


def begin(run_in: RunIn, guest: GuestRecord, program: str) -> None:
    """Start a program that runs on, and wait until it is up."""
    line = f"setsid sh -c {program!r} </dev/null >/dev/null 2>&1 &"
    if "'" in program:
        line = f'setsid sh -c "{program}" </dev/null >/dev/null 2>&1 &'
    until_up = "until [ -e /run/up ]; do usleep 10000; done"
    assert run_in(guest, "sh", "-c", f"{line}\n{until_up}").exit_code == 0


@pytest.mark.parametrize("init", ["minimal", "busybox"])
def test_stop_gives_programs_their_time(
    host: Runtime, guests: Guests, init: str, run_in: RunIn, request: pytest.FixtureRequest
) -> None:
    system = request.getfixturevalue(init)
    (guest,) = records(guests.clone(system, name="slow", disks=DISK))
    begin(run_in, guest, SLOW)
    assert asyncio.run(stop_guests(host, [guest], 60)) == [Stopped(Ending.SHUT_DOWN)]
    # It comes back with its disk, which was unmounted.
    (guest,) = records(guests.clone(system, name="slow", disks=DISK))
    assert run_in(guest, "cat", "/data/end").stdout == b"whole\n"
    log = run_in(guest, "dmesg").text
    assert "EXT4-fs" in log and "recovery" not in log
    begin(run_in, guest, STUBBORN)
    (stopped,) = asyncio.run(stop_guests(host, [guest], 1))
    assert stopped.how is Ending.KILLED
    assert "sh" in stopped.programs.partition(": ")[2].split(", ")
    assert stopped.text.startswith("was ended: not all programs ended in time (")


def test_a_program_that_stands_still_is_heard_too(
    host: Runtime, guests: Guests, minimal: Artifact, run_in: RunIn
) -> None:
    (guest,) = records(guests.clone(minimal, name="still"))
    begin(run_in, guest, "touch /run/up; kill -STOP $$; sleep 1000")
    assert asyncio.run(stop_guests(host, [guest], 60)) == [Stopped(Ending.SHUT_DOWN)]


def test_ctrl_c_ends_the_wait_and_not_the_shutdown(
    host: Runtime, guests: Guests, minimal: Artifact, run_in: RunIn
) -> None:
    (guest,) = records(guests.clone(minimal, name="stubborn"))
    begin(run_in, guest, STUBBORN)
    argv = [ONECOPY, "stop", guest.name, "--timeout", "20"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, process_group=0) as command:
        while not run_in(guest, "ls", "/run/onecopy").stdout.count(b"patience"):
            assert command.poll() is None
            time.sleep(0.1)
        command.send_signal(signal.SIGINT)
        assert command.wait(STUCK) == 130
        assert asyncio.run(wait_for_end(guest, 0)) is False
    assert asyncio.run(wait_for_end(guest, STUCK))


def test_the_watcher_comes_back(
    host: Runtime, guests: Guests, minimal: Artifact, run_in: RunIn
) -> None:
    """Killed as inits kill all, it is started by the kernel, as what cannot be killed so easily."""
    (guest,) = records(guests.clone(minimal, name="watched"))
    before = run_in(guest, "pidof", "@onecopy-watcher").text.split()
    look = "cd /proc/$(pidof @onecopy-watcher) && cat oom_score_adj cgroup && cut -d' ' -f41 stat"
    killed = f"kill -9 {before[0]}; until {look}; do usleep 100000; done 2>/dev/null"
    lines = run_in(guest, "sh", "-c", killed).text.splitlines()
    assert lines == ["-1000", "1:name=onecopy:/watcher", "0::/onecopy-guest/agent", "1"]
    assert run_in(guest, "pidof", "@onecopy-watcher").text.split() != before
    told = end_all(host, [guest], ["poweroff -f"])
    assert POWERED_OFF in told[0].console
    assert wrong(told, FORCED) == []
