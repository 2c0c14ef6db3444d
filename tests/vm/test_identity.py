"""Each clone has its own identity, and none becomes ready without confirming it.

Not here: names and SSH host keys (test_names.py), shared memory (test_sharing_clones.py).
"""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections.abc import Iterator

import pytest

from onecopy.errors import AgentFailed
from onecopy.guest.exec import run_captured
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB, PAGE_SIZE, Reference
from onecopy.store import Artifact
from tests.vm.conftest import RunIn
from tests.vm.guests import Guests
from tests.vm.physical import private, ram

#: One line for each thing that two machines must not have in common.
WHO = """\
hostname
cat /etc/machine-id
cat /sys/class/net/eth0/address
ip -4 -o addr show dev eth0 | grep -o 'inet [0-9.]*'
head -c 32 /dev/urandom | md5sum
cat /proc/sys/kernel/random/uuid
cat /proc/sys/kernel/random/uuid
"""
MANY = 50


@pytest.fixture
def fifty(
    host: Runtime, guests: Guests, saved: Artifact, run_in: RunIn
) -> Iterator[list[GuestRecord]]:
    """Clones of a guest that has a machine-id, each with a forwarded port."""
    (first,) = guests.clone(saved)
    first.exec(["sh", "-c", "cat /proc/sys/kernel/random/uuid | tr -d - >/etc/machine-id"])
    system = first.save("many").artifact
    first.stop()
    clones = guests.clone(system, MANY, name="one-of", publish=[(0, 80)])
    yield [clone.record for clone in clones]
    guests.end()
    host.store.remove(Reference("many"))


def test_fifty_clones_differ_in_all(host: Runtime, fifty: list[GuestRecord]) -> None:
    async def asked() -> list[list[str]]:
        turn = asyncio.Semaphore(4)

        async def one(guest: GuestRecord) -> list[str]:
            async with turn:
                done = await run_captured(host.run / guest.name, ["sh", "-c", WHO], timeout=120)
            assert done.exit_code == 0, done
            return done.stdout.decode().split("\n")

        return await asyncio.gather(*map(one, fifty))

    # They serve at once, each at its own port.
    for guest in fifty:
        url = f"http://127.0.0.1:{guest.publish[0][0]}/"
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert answer.read().decode().strip() == guest.name
    said = asyncio.run(asked())
    assert {len(lines) for lines in said} == {len(WHO.splitlines()) + 1}
    for number, what in enumerate(WHO.splitlines()):
        values = {lines[number] for lines in said}
        assert len(values) == MANY, what
        assert all(values), what
    # The records say the same.
    assert [lines[0] for lines in said] == [guest.name for guest in fifty]
    assert [lines[2] for lines in said] == [guest.mac for guest in fifty]
    assert [lines[3] for lines in said] == [f"inet {guest.address}" for guest in fifty]


@pytest.mark.smoke
def test_clock_and_hook(host: Runtime, guests: Guests, saved: Artifact) -> None:
    (guest,) = guests.clone(saved)
    # As if it had been saved years ago.
    guest.exec(["date", "-s", "2020-01-01 00:00:00"])
    system = guest.save(
        "old", clone_hooks=["command:echo $(hostname) $(date +%Y) >/root/hook"]
    ).artifact
    try:
        for clone in guests.clone(system, 2):
            assert abs(int(clone.exec(["date", "+%s"]).text) - time.time()) < 20
            said = clone.exec(["cat", "/root/hook"]).text.split()
            assert said == [clone.name, str(time.gmtime().tm_year)]
    finally:
        guests.end()
        host.store.remove(Reference("old"))


def test_who_does_not_confirm_is_not_handed_out(
    host: Runtime, guests: Guests, minimal: Artifact, run_in: RunIn
) -> None:
    guest = guests.clone(minimal)[0].record

    def why(command: str) -> str:
        system = guests.save(guest, "fails", clone_hooks=[f"command:{command}"]).artifact
        with pytest.raises(AgentFailed) as caught:
            guests.clone(system, name="never")
        assert not (host.run / "never").exists()
        return caught.value.message

    try:
        assert "exit code 3: no luck" in why("echo no luck; exit 3")
        # A kernel that does not hear of its being cloned.
        unbind = "echo QEMUVGID:00 >/sys/bus/platform/drivers/vmgenid/unbind"
        assert run_in(guest, "sh", "-c", unbind).exit_code == 0
        assert "random generator" in why("")
        # Nor is it saved if it could not become another.
        assert run_in(guest, "ip", "link", "set", "eth0", "down").exit_code == 0
        assert run_in(guest, "ip", "link", "set", "eth0", "name", "other").exit_code == 0
        with pytest.raises(AgentFailed, match="network"):
            guests.save(guest, "fails")
    finally:
        host.store.remove(Reference("fails"))


@pytest.fixture
def two(guests: Guests, systemd_system: Artifact) -> list[GuestRecord]:
    """Two clones of a saved Debian with systemd."""
    return [guest.record for guest in guests.clone(systemd_system, 2, name="own")]


def test_clones_of_a_systemd_guest(two: list[GuestRecord], run_in: RunIn) -> None:
    # Udev was done with the devices when it was saved, and its workers, which end after 3 s, gone:
    # clones that go on with that have soon four times as much.
    time.sleep(4)
    for guest in two:
        assert sum(map(private, ram(guest))) * PAGE_SIZE < 5 * MIB

    def said(*argv: str) -> list[str]:
        done = [run_in(guest, *argv) for guest in two]
        assert [each.exit_code for each in done] == [0, 0], done
        return [each.stdout.decode().strip() for each in done]

    assert said("hostname") == ["own-1", "own-2"]
    ids = said("cat", "/etc/machine-id")
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)
    assert len(set(ids)) == 2
    assert len(set(said("cat", "/proc/sys/kernel/random/uuid"))) == 2
    assert said("systemctl", "is-system-running") == ["running"] * 2
    assert said("cat", "/proc/1/comm") == ["systemd"] * 2
