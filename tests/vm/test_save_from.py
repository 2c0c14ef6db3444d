"""Saving a running guest, booted or cloned: it continues, and clones have its state.

Not here: saved systems in general (test_lifecycle.py, test_sharing_clones.py).
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from onecopy.errors import InUse, InvalidInput
from onecopy.guest.exec import run_captured
from onecopy.guest.lifecycle.save import Saved, save_guest
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.guest.segments.attach import attach
from onecopy.model import MIB, Reference
from onecopy.store import Artifact
from tests.vm.conftest import Boot, Clones, RunIn
from tests.vm.guests import Guests

AGAIN = Reference("again")
SaveAgain = Callable[[GuestRecord], tuple[Saved, GuestRecord]]


@pytest.fixture
def save_again(host: Runtime, guests: Guests) -> Iterator[SaveAgain]:
    """``save_again(guest)`` saves a guest and starts a clone of that."""

    def save(guest: GuestRecord) -> tuple[Saved, GuestRecord]:
        done = guests.save(guest, AGAIN)
        return done, guests.clone(done.artifact, name="next")[0].record

    yield save
    guests.end()
    if host.store.find(AGAIN, "system"):
        host.store.remove(AGAIN)


def _text(run_in: RunIn, guest: GuestRecord, script: str) -> str:
    done = run_in(guest, "sh", "-c", script)
    assert done.exit_code == 0, done
    return done.stdout.decode().strip()


def test_a_clone_with_writes_of_its_own(
    clones: Clones, run_in: RunIn, save_again: SaveAgain
) -> None:
    (guest,) = clones(1)
    fill = "dd if=/dev/urandom of=/root/data bs=1M count=8 2>/dev/null; md5sum </root/data"
    written = _text(run_in, guest, fill)
    # What was written and freed again is not stored.
    _text(run_in, guest, "dd if=/dev/urandom of=/dev/shm/x bs=1M count=40; rm /dev/shm/x")
    done, after = save_again(guest)
    # It goes on as it was,
    assert _text(run_in, guest, "hostname; md5sum </root/data").split("\n") == [guest.name, written]
    # and the new one has all of it, and a name of its own.
    assert _text(run_in, after, "hostname; md5sum </root/data").split("\n") == ["next", written]
    answer = "wget -qO- http://127.0.0.1/"
    assert _text(run_in, after, answer) == "next"
    assert done.pause > 0
    used = int(_text(run_in, guest, "awk '/MemTotal/ {t=$2} /MemFree/ {print t-$2}' /proc/meminfo"))
    assert done.stored < used * 1024 + 48 * MIB


def test_a_booted_guest(
    host: Runtime, boot: Boot, busybox_root: Artifact, run_in: RunIn, save_again: SaveAgain
) -> None:
    guest = boot(busybox_root, memory=128 * MIB)
    _text(run_in, guest, "mkdir -p /root; echo here >/root/mark")
    done, after = save_again(guest)
    assert _text(run_in, after, "hostname; cat /root/mark") == "next\nhere"
    assert _text(run_in, guest, "hostname; cat /root/mark") == f"{guest.name}\nhere"
    assert done.memory == 128 * MIB
    # What it never touched is not stored.
    assert done.stored < done.memory
    ram = done.artifact.layer("ram").path.stat()
    assert ram.st_blocks * 512 == done.stored
    assert ram.st_size == done.memory


def test_what_cannot_be_saved(
    host: Runtime, clones: Clones, busybox_root: Artifact, run_in: RunIn, save_again: SaveAgain
) -> None:
    guest, other = clones(2)
    asyncio.run(attach(host, guest.name, Reference.parse(busybox_root.ref)))
    with pytest.raises(InvalidInput, match="added after its start"):
        save_again(guest)
    assert _text(run_in, guest, "hostname") == guest.name

    async def while_a_program_runs() -> None:
        running = asyncio.ensure_future(
            run_captured(host.run / other.name, ["sh", "-c", "touch /tmp/up; sleep 60"], timeout=60)
        )
        await asyncio.sleep(0.5)
        try:
            with pytest.raises(InUse, match="runs a program"):
                await save_guest(host, AGAIN, other.name)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(while_a_program_runs())
    assert _text(run_in, other, "hostname") == other.name
    assert not host.store.find(AGAIN, "system")
    assert not list((host.store.root / "tmp").iterdir())


#: A command that has a guest's programs frozen and does not come to its end.
FREEZE = """
import asyncio, pathlib, sys
from onecopy.guest.lifecycle.freeze import frozen
async def work():
    async with frozen(pathlib.Path(sys.argv[1]), print):
        print("frozen", flush=True)
        await asyncio.sleep(600)
asyncio.run(work())
"""


@pytest.fixture
def served(guests: Guests, saved: Artifact) -> GuestRecord:
    """A clone whose application answers on a port of the host."""
    return guests.clone(saved, name="served", publish=[(0, 80)])[0].record


def _answer(guest: GuestRecord, seconds: float) -> str:
    url = f"http://127.0.0.1:{guest.publish[0][0]}/"
    with urllib.request.urlopen(url, timeout=seconds) as answer:
        return str(answer.read().decode().strip())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_ends_while_programs_are_frozen(
    host: Runtime, served: GuestRecord, run_in: RunIn, how: signal.Signals
) -> None:
    argv = [sys.executable, "-c", FREEZE, str(host.run / served.name)]
    assert _answer(served, 60) == served.name
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as command:
        assert command.stdout and command.stdout.readline() == b"frozen\n"
        with pytest.raises(TimeoutError):
            _answer(served, 2)
        command.send_signal(how)
    # Killed, it told nobody: the guest goes on by itself.
    assert _answer(served, 120) == served.name
    assert _text(run_in, served, "cat /run/onecopy/cgroup/guest/cgroup.freeze") == "0"


def test_what_stands_still_and_what_does_not(
    host: Runtime, guests: Guests, minimal: Artifact, run_in: RunIn, save_again: SaveAgain
) -> None:
    guest = guests.clone(minimal)[0].record
    # A group that its user has frozen, and a program that is in no group that can be.
    script = """
        cd /sys/fs/cgroup && mkdir mine && echo 1 >mine/cgroup.freeze
        (while usleep 20000; do date +%s >/tmp/new; mv /tmp/new /tmp/now; done) >/dev/null 2>&1 &
        echo $! >cgroup.procs
        date -s 2020-01-01; hostname the-users-own; cat /proc/uptime
    """
    _text(run_in, guest, script)
    _, after = save_again(guest)
    assert _text(run_in, guest, "hostname; date +%Y").split() == ["the-users-own", "2020"]
    frozen = "cat /sys/fs/cgroup/mine/cgroup.freeze /sys/fs/cgroup/guest/cgroup.freeze; hostname"
    assert _text(run_in, guest, frozen).split() == ["1", "0", "the-users-own"]
    assert _text(run_in, after, frozen).split() == ["1", "0", "next"]
    # It goes on in both, by the clock of each.
    year = (
        "rm /tmp/now; while ! [ -s /tmp/now ]; do usleep 1000; done; date -d @$(cat /tmp/now) +%Y"
    )
    assert _text(run_in, guest, year) == "2020"
    assert int(_text(run_in, after, year)) >= 2026
    # A kernel without control groups is told of.
    _text(run_in, guest, "umount -l /sys/fs/cgroup; umount -l /run/onecopy/cgroup")
    said: list[str] = []
    asyncio.run(save_guest(host, AGAIN, guest.name, said.append))
    assert [each for each in said if each.startswith("skipped: the freezing of programs")]
