"""Saving a guest that runs, booted or cloned: it goes on, and clones have what it had.

Not here: what a saved system is in general (test_lifecycle.py, test_sharing_clones.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from onecopy.errors import InUse, InvalidInput
from onecopy.guest.attach import attach
from onecopy.guest.exec import run_captured
from onecopy.guest.folder import GuestRecord
from onecopy.guest.host import Host
from onecopy.guest.save import Saved, save_guest
from onecopy.guest.start import start_clone, template
from onecopy.model import MIB, Reference
from onecopy.store import Artifact
from tests.vm.conftest import Clones, Cold, RunIn

AGAIN = Reference("again")
SaveAgain = Callable[[GuestRecord], tuple[Saved, GuestRecord]]


@pytest.fixture
def save_again(host: Host) -> Iterator[SaveAgain]:
    """``save_again(guest)`` saves a guest and starts a clone of that."""
    started = []

    def save(guest: GuestRecord) -> tuple[Saved, GuestRecord]:
        done = asyncio.run(save_guest(host, AGAIN, guest.name))
        started.append(asyncio.run(start_clone(host, template(host, done.artifact), "next")))
        return done, started[-1]

    yield save
    for guest in started:
        host.end(guest)
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
    host: Host, cold: Cold, busybox_root: Artifact, run_in: RunIn, save_again: SaveAgain
) -> None:
    guest = cold(busybox_root, memory=128 * MIB)
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
    host: Host, clones: Clones, busybox_root: Artifact, run_in: RunIn, save_again: SaveAgain
) -> None:
    guest, other = clones(2)
    asyncio.run(attach(host, guest.name, Reference.parse(busybox_root.ref)))
    with pytest.raises(InvalidInput, match="since its start"):
        save_again(guest)
    assert _text(run_in, guest, "hostname") == guest.name

    async def while_a_program_runs() -> None:
        running = asyncio.ensure_future(
            run_captured(host.run / other.name, ["sh", "-c", "touch /tmp/up; sleep 60"], timeout=60)
        )
        await asyncio.sleep(0.5)
        try:
            with pytest.raises(InUse, match="a program runs"):
                await save_guest(host, AGAIN, other.name)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(while_a_program_runs())
    assert _text(run_in, other, "hostname") == other.name
    assert not host.store.find(AGAIN, "system")
    assert not list((host.store.root / "tmp").iterdir())
