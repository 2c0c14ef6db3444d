"""Standby clones: how they are taken, replaced, and cleaned up after a kill.

The evidence that a clone was on standby is its VMM, which existed before. Its identity is its own
answer.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onecopy import Host
from onecopy.errors import AlreadyExists
from onecopy.guest.lifecycle import pool, pool_fill
from onecopy.guest.lifecycle.start import start_one
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.images.build import build_segment
from onecopy.model import Reference, parse_mount
from onecopy.store import Artifact
from tests.command import ONECOPY, onecopy, refused
from tests.vm.conftest import RunIn, left, vmms
from tests.vm.guests import clone_plan


@pytest.fixture
def empty(host: Runtime) -> Iterator[dict[str, list[str]]]:
    """What there is before the test; afterwards there is no more."""
    before = left(host)
    yield before
    host.end(*host.guests(), *host.prepared())
    for each in pool.pools(host):
        pool.remove(host, Reference.parse(each.system))
    assert left(host) == before


def prepared(host: Runtime, saved: Artifact, size: int) -> set[int]:
    """Prepare so many; the process ids of their VMMs."""
    ready = asyncio.run(pool_fill.resize(host, saved, size)).ready
    assert len(ready) == size
    return {record.pid for record in ready}


def clone(host: Runtime, saved: Artifact, name: str, **fields: Any) -> GuestRecord:
    return asyncio.run(start_one(host, clone_plan(host, saved, **fields), name))


def answer(guest: GuestRecord) -> str:
    url = f"http://127.0.0.1:{guest.publish[0][0]}/"
    with urllib.request.urlopen(url, timeout=60) as reply:
        return str(reply.read().decode().strip())


@pytest.mark.usefixtures("empty")
def test_a_prepared_guest_is_like_any_other(
    host: Runtime, saved: Artifact, run_in: RunIn, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("of a further segment")
    build_segment(host.store, Reference("further"), f"dir:{tmp_path}")
    pids = prepared(host, saved, 2)
    assert not host.guests()
    fields = {"publish": ((0, 80),), "segments": (parse_mount("further:/mnt"),)}
    guests = [clone(host, saved, f"quick-{number}", **fields) for number in range(3)]
    assert {guest.pid for guest in guests[:2]} == pids
    assert guests[2].pid not in pids
    assert [answer(guest) for guest in guests] == [guest.name for guest in guests]
    assert host.store.users(saved.digest) == [guest.name for guest in guests]
    own = [
        run_in(guest, "sh", "-c", "cat /sys/class/net/eth0/address /proc/sys/kernel/hostname").text
        for guest in guests
    ]
    assert own == [f"{guest.mac}\n{guest.name}\n" for guest in guests]
    assert len({guest.mac for guest in guests}) == len({guest.address for guest in guests}) == 3
    # The first two were given it as files of theirs, in folders that have other names now.
    for guest in guests:
        assert run_in(guest, "cat", "/mnt/file").text == "of a further segment"
    onecopy("stop", *[guest.name for guest in guests])


@pytest.mark.usefixtures("empty")
def test_a_pool_fills_again_when_half_is_taken(host: Runtime, saved: Artifact) -> None:
    pids = prepared(host, saved, 2)
    onecopy("run", "--name", "first", saved.name)
    deadline = time.monotonic() + 120
    while (ready := len(host.prepared())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ready == 2
    (taken,) = (guest for guest in host.guests())
    assert taken.pid in pids
    assert onecopy("pool").stdout.split()[-3:] == [saved.ref, "2", "2"]
    report = onecopy("report").stdout
    assert all(record.name in report for record in host.prepared())
    onecopy("pool", saved.name, "0")
    assert vmms(host) == [taken.pid]


@pytest.mark.usefixtures("empty")
def test_a_killed_one_is_replaced(host: Runtime, saved: Artifact) -> None:
    (pid,) = prepared(host, saved, 1)
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    while host.prepared():
        time.sleep(0.01)
    os.close(pidfd)
    host.sweep()
    guest = clone(host, saved, "after", publish=((0, 80),))
    assert guest.pid != pid
    assert answer(guest) == "after"
    asyncio.run(pool_fill.fill(host))
    assert len(host.prepared()) == 1


@pytest.mark.usefixtures("empty")
def test_what_was_replaced_or_removed_is_not_kept(host: Runtime, saved: Artifact) -> None:
    name = Reference("pooled")
    host.store.tag(Reference.parse(saved.ref), name)
    prepared(host, host.store.resolve(name), 1)
    onecopy("rm", str(name))
    assert not host.prepared()
    assert not pool.pools(host)
    refused(3, "pool", "pooled", "1")


@pytest.mark.usefixtures("empty")
def test_a_name_that_is_taken_costs_nothing(host: Runtime, saved: Artifact) -> None:
    prepared(host, saved, 1)
    guest = clone(host, saved, "one")
    prepared(host, saved, 1)
    with pytest.raises(AlreadyExists):
        clone(host, saved, guest.name)
    assert len(host.prepared()) == 1


# Dies by itself where it would rename for the NUMBERth time, or after all that.
_KILLED = """
import os, sys
from pathlib import Path
from onecopy.guest.runtime import Runtime

host, digest, left = Runtime.open(), sys.argv[1], int(sys.argv[2])
rename = Path.rename
def dying(self, target):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
    return rename(self, target)
with host.batch() as batch:
    Path.rename = dying
    with host.taking(digest, "half", batch) as taken:
        assert taken
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("number", [1, 2, 3, 9])
def test_killed_while_it_takes_one(
    host: Runtime, saved: Artifact, empty: dict[str, list[str]], number: int
) -> None:
    prepared(host, saved, 1)
    done = subprocess.run([sys.executable, "-c", _KILLED, saved.digest, str(number)])
    assert done.returncode == -signal.SIGKILL
    onecopy("ps")
    assert left(host) == empty


def test_killed_while_it_fills(host: Runtime, saved: Artifact, empty: dict[str, list[str]]) -> None:
    with subprocess.Popen([ONECOPY, "pool", saved.name, "8"], stderr=subprocess.PIPE) as command:
        while len(vmms(host)) < len(empty["vmms"]) + 2:
            assert command.poll() is None
        command.kill()
    onecopy("ps")
    assert left(host) == empty


@pytest.mark.usefixtures("empty")
def test_from_python(host: Runtime, saved: Artifact) -> None:
    with Host(host.store.root) as mine:
        assert mine.pool(saved.ref, 2) == 2
        pids = {record.pid for record in host.prepared()}
        with mine.start(saved.ref, 2) as guests:
            assert {guest.record.pid for guest in guests} == pids
            assert [guest.exec(["hostname"]).text.strip() for guest in guests] == [
                guest.name for guest in guests
            ]
        assert mine.pool(saved.ref, 0) == 0
    assert not host.prepared()
