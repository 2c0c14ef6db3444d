"""Ends of guests: each comes within seconds, and is told; `stop` gives programs their time.

Not here: all ends under all inits (tests/workloads/ends_table.py), and how the host keeps what was
told.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from onecopy.guest.lifecycle.batch import start_many
from onecopy.guest.lifecycle.bootplan import BootSpec
from onecopy.guest.lifecycle.disks import DiskSpec
from onecopy.guest.lifecycle.resources import ExtraResources
from onecopy.guest.lifecycle.restore import CloneSpec, start_clone, template
from onecopy.guest.lifecycle.save import save_system
from onecopy.guest.lifecycle.stop import Ending, Stopped, stop_guests, wait_for_end
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.images.build import build_segment
from onecopy.model import MIB, Reference
from onecopy.store import Artifact
from tests.vm.conftest import Cold, RunIn
from tests.vm.ends import ASKED, ENDS, FORCED, MINIMAL, POWERED_OFF, STUCK, end_all, wrong

ONECOPY = str(Path(sys.executable).with_name("onecopy"))
DISK = CloneSpec(fitting=ExtraResources(disks=(DiskSpec(size=64 * MIB, mountpoint="/data"),)))
#: A program that takes 3 s to end, and its words then.
SLOW = "trap 'sleep 3; echo whole >/data/end; exit' TERM; touch /run/up; while :; do sleep 1; done"
STUBBORN = "trap : TERM; touch /run/up; while :; do sleep 1; done"


def started(
    host: Runtime, system: Artifact, names: Sequence[str], spec: CloneSpec | None = None
) -> list[GuestRecord]:
    made, spec = template(host, system), spec or CloneSpec()
    begun = start_many(host, names, lambda name, batch: start_clone(host, made, name, spec, batch))
    return list(asyncio.run(begun).guests)


@pytest.fixture(autouse=True)
def _end_guests(host: Runtime) -> Iterator[None]:
    yield
    host.end(*host.guests())


@pytest.fixture(scope="module")
def minimal(host: Runtime, busybox_root: Artifact) -> Artifact:
    """Saved system: our minimal init, and nothing else."""
    spec = BootSpec(Reference.parse(busybox_root.ref), memory=128 * MIB, command="")
    return asyncio.run(save_system(host, Reference("minimal"), spec)).artifact


@pytest.fixture(scope="session")
def busybox_init_root(host: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Root segment: busybox with its init."""
    folder = tmp_path_factory.mktemp("init")
    for path in ("bin", "sbin", "etc"):
        (folder / path).mkdir()
    (folder / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (folder / "bin/busybox").chmod(0o755)
    (folder / "bin/sh").symlink_to("busybox")
    (folder / "sbin/init").symlink_to("../bin/busybox")
    (folder / "etc/inittab").write_text("::sysinit:/bin/busybox true\n")
    return build_segment(host.store, Reference("busybox-init"), f"dir:{folder}")


@pytest.fixture(scope="module")
def busybox(host: Runtime, busybox_init_root: Artifact) -> Artifact:
    """Saved system: busybox's init."""
    spec = BootSpec(Reference.parse(busybox_init_root.ref), memory=128 * MIB)
    return asyncio.run(save_system(host, Reference("busybox-saved"), spec)).artifact


@pytest.mark.parametrize("init", ["minimal", "busybox"])
def test_each_end_of_clones(host: Runtime, init: str, request: pytest.FixtureRequest) -> None:
    expected = ENDS[init]
    names = [f"end-{number}" for number in range(len(expected))]
    guests = started(host, request.getfixturevalue(init), names)
    assert wrong(end_all(host, guests, list(expected)), expected) == []


def test_ends_under_systemd(host: Runtime, systemd_system: Artifact) -> None:
    expected = {key: ENDS["systemd"][key] for key in ("systemctl reboot", "halt -f")}
    guests = started(host, systemd_system, ["s-1", "s-2"])
    assert wrong(end_all(host, guests, list(expected)), expected) == []


def test_a_booted_guest_halts(host: Runtime, cold: Cold, busybox_root: Artifact) -> None:
    guest = cold(busybox_root, memory=128 * MIB, command="", idle=False)
    assert wrong(end_all(host, [guest], ["halt"]), ASKED) == []


def test_a_command_that_ends_leaves_the_others_their_time(
    host: Runtime, minimal: Artifact, run_in: RunIn
) -> None:
    guest, again = started(host, minimal, ["left-1"], DISK)[0], None
    begin(run_in, guest, SLOW)
    (command,) = MINIMAL
    assert wrong(end_all(host, [guest], [command]), MINIMAL) == []
    host.end(guest)
    (again,) = started(host, minimal, ["left-1"], DISK)
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
    host: Runtime, init: str, run_in: RunIn, request: pytest.FixtureRequest
) -> None:
    system = request.getfixturevalue(init)
    (guest,) = started(host, system, ["slow"], DISK)
    begin(run_in, guest, SLOW)
    assert asyncio.run(stop_guests(host, [guest], 60)) == [Stopped(Ending.SHUT_DOWN)]
    # It comes back with its disk, which was unmounted.
    (guest,) = started(host, system, ["slow"], DISK)
    assert run_in(guest, "cat", "/data/end").stdout == b"whole\n"
    log = run_in(guest, "dmesg").text
    assert "EXT4-fs" in log and "recovery" not in log
    begin(run_in, guest, STUBBORN)
    (stopped,) = asyncio.run(stop_guests(host, [guest], 1))
    assert stopped.how is Ending.KILLED
    assert "sh" in stopped.programs.partition(": ")[2].split(", ")
    assert stopped.text.startswith("was ended: not all programs ended in time (")


def test_a_program_that_stands_still_is_heard_too(
    host: Runtime, minimal: Artifact, run_in: RunIn
) -> None:
    (guest,) = started(host, minimal, ["still"])
    begin(run_in, guest, "touch /run/up; kill -STOP $$; sleep 1000")
    assert asyncio.run(stop_guests(host, [guest], 60)) == [Stopped(Ending.SHUT_DOWN)]


def test_ctrl_c_ends_the_wait_and_not_the_shutdown(
    host: Runtime, minimal: Artifact, run_in: RunIn
) -> None:
    (guest,) = started(host, minimal, ["stubborn"])
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


def test_the_watcher_comes_back(host: Runtime, minimal: Artifact, run_in: RunIn) -> None:
    """Killed as inits kill all, it is started by the kernel, as what cannot be killed so easily."""
    (guest,) = started(host, minimal, ["watched"])
    before = run_in(guest, "pidof", "@onecopy-watcher").text.split()
    look = "cd /proc/$(pidof @onecopy-watcher) && cat oom_score_adj cgroup && cut -d' ' -f41 stat"
    killed = f"kill -9 {before[0]}; until {look}; do usleep 100000; done 2>/dev/null"
    lines = run_in(guest, "sh", "-c", killed).text.splitlines()
    assert lines == ["-1000", "1:name=onecopy:/watcher", "0::/onecopy-guest/agent", "1"]
    assert run_in(guest, "pidof", "@onecopy-watcher").text.split() != before
    told = end_all(host, [guest], ["poweroff -f"])
    assert POWERED_OFF in told[0].console
    assert wrong(told, FORCED) == []
