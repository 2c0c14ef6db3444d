"""Each clone is a machine of its own, and none is handed out that does not confirm it.

Not here: names and SSH host keys (test_names.py), what clones share (test_sharing_clones.py).
"""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections.abc import Iterator, Sequence

import pytest

from onecopy.errors import AgentFailed
from onecopy.guest.exec import run_captured
from onecopy.guest.lifecycle.batch import start_many
from onecopy.guest.lifecycle.restore import CloneSpec, start_clone, template
from onecopy.guest.lifecycle.save import save_guest
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB, PAGE_SIZE, Reference
from onecopy.store import Artifact
from tests.vm.conftest import Cold, RunIn
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


def start(
    host: Runtime, source: Artifact, names: Sequence[str], spec: CloneSpec
) -> list[GuestRecord]:
    made = template(host, source)
    begun = start_many(host, names, lambda name, batch: start_clone(host, made, name, spec, batch))
    return list(asyncio.run(begun).guests)


@pytest.fixture
def fifty(host: Runtime, saved: Artifact, run_in: RunIn) -> Iterator[list[GuestRecord]]:
    """Clones of a guest that has a machine-id, each with a forwarded port."""
    (first,) = start(host, saved, ["first"], CloneSpec())
    done = run_in(first, "sh", "-c", "cat /proc/sys/kernel/random/uuid | tr -d - >/etc/machine-id")
    assert done.exit_code == 0
    system = asyncio.run(save_guest(host, Reference("many"), "first")).artifact
    host.end(first)
    names = [f"one-of-{number}" for number in range(MANY)]
    guests = start(host, system, names, CloneSpec(publish=((0, 80),)))
    yield guests
    for guest in guests:
        host.end(guest)
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
def test_clock_and_hook(host: Runtime, saved: Artifact, run_in: RunIn) -> None:
    (guest,) = start(host, saved, ["years-ago"], CloneSpec())
    made = []
    try:
        # As if it had been saved years ago.
        assert run_in(guest, "date", "-s", "2020-01-01 00:00:00").exit_code == 0
        hook = "echo $(hostname) $(date +%Y) >/root/hook"
        asyncio.run(save_guest(host, Reference("old"), guest.name, on_clone=hook))
        system = host.store.resolve(Reference("old"), "system")
        made = start(host, system, ["today-1", "today-2"], CloneSpec())
        for clone in made:
            now = int(run_in(clone, "date", "+%s").stdout)
            assert abs(now - time.time()) < 20
            said = run_in(clone, "cat", "/root/hook").stdout.decode().split()
            assert said == [clone.name, str(time.gmtime().tm_year)]
    finally:
        for each in (guest, *made):
            host.end(each)
        if host.store.find(Reference("old"), "system"):
            host.store.remove(Reference("old"))


def test_who_does_not_confirm_is_not_handed_out(
    host: Runtime, cold: Cold, busybox_root: Artifact, run_in: RunIn
) -> None:
    guest = cold(busybox_root, memory=128 * MIB)
    ref = Reference("fails")

    def why(on_clone: str) -> str:
        system = asyncio.run(save_guest(host, ref, guest.name, on_clone=on_clone)).artifact
        with pytest.raises(AgentFailed) as caught:
            start(host, system, ["never"], CloneSpec())
        assert not (host.run / "never").exists()
        return caught.value.message

    try:
        assert "exit code 3: no luck" in why("echo no luck; exit 3")
        # A kernel that does not hear of its being cloned.
        unbind = "echo QEMUVGID:00 >/sys/bus/platform/drivers/vmgenid/unbind"
        assert run_in(guest, "sh", "-c", unbind).exit_code == 0
        assert "random numbers" in why("")
        # Nor is it saved if it could not become another.
        assert run_in(guest, "ip", "link", "set", "eth0", "down").exit_code == 0
        assert run_in(guest, "ip", "link", "set", "eth0", "name", "other").exit_code == 0
        with pytest.raises(AgentFailed, match="network"):
            asyncio.run(save_guest(host, ref, guest.name))
    finally:
        host.store.remove(ref)


@pytest.fixture
def two(host: Runtime, systemd_system: Artifact) -> Iterator[list[GuestRecord]]:
    """Two clones of a saved Debian with systemd."""
    guests = start(host, systemd_system, ["own-1", "own-2"], CloneSpec())
    yield guests
    for guest in guests:
        host.end(guest)


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
