"""Guests where process 1 reaps nobody, as in a container without an init: all work as elsewhere.

There each VMM and fork server whose parent has ended stays as a zombie. This process stands for
such a process 1. Not here: user numbers of zombies (tests/unit/linux/test_vmm_registry.py).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.linux import cgroup, process, vmm_registry
from onecopy.linux.syscall import prctl
from onecopy.store import Artifact
from onecopy.vmm import fork_registry
from tests.command import answer, onecopy
from tests.unit.vmm.fork_kit import runs, wait_for
from tests.vm.forks import server_of, servers

_PR_SET_CHILD_SUBREAPER = 36
NAMES = ("forked", "executed")


@pytest.fixture
def no_reaper(host: Runtime) -> Iterator[None]:
    """Let this process have the orphans of its descendants, and reap none until the end."""
    fork_registry.end(host.run.name)
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0)
        onecopy("stop", *NAMES, code=None)
        host.forget(*NAMES)
        fork_registry.end(host.run.name)
        for task in Path("/proc/self/task").glob("*/children"):
            for pid in filter(is_zombie, map(int, task.read_text().split())):
                with suppress(ChildProcessError):
                    os.waitpid(pid, 0)


def is_zombie(pid: int) -> bool:
    return process.stat(pid).state == "Z" and not runs(pid)


def start_both(host: Runtime, system: Artifact) -> tuple[GuestRecord, GuestRecord]:
    """Start a clone each way by a command that ends, so that what it starts becomes an orphan."""
    onecopy("run", "--name", "forked", system.ref)
    onecopy("run", "--name", "executed", "--isolated-vmm", system.ref)
    return host.guest("forked").record(), host.guest("executed").record()


def shown() -> set[str]:
    return {row["name"] for row in answer("ps", "--json")}


@pytest.mark.usefixtures("no_reaper")
def test_nothing_but_zombies_is_left(host: Runtime, saved: Artifact) -> None:
    forked, executed = guests = start_both(host, saved)
    server = server_of(forked.pid)
    assert forked.forked and server and not executed.forked
    uids = [process.owner(each.pid) for each in guests]
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: is_zombie(server))
    for pid in (server, forked.pid, executed.pid):
        assert process.parent(pid) == os.getpid()
    assert servers(host) == []
    assert set(NAMES) <= shown()
    # One is stopped, the other one is killed.
    onecopy("stop", "executed")
    os.kill(forked.pid, signal.SIGKILL)
    wait_for(lambda: is_zombie(forked.pid))
    assert not set(NAMES) & shown()
    assert "SIGKILL" in onecopy("ps", "--all").stdout
    for guest, uid in zip(guests, uids, strict=True):
        assert is_zombie(guest.pid) and not guest.process.lives()
        assert not (host.run / guest.name).exists()
        assert not host.store.is_held(guest.name)
        assert os.geteuid() or uid not in vmm_registry.users()
        groups = cgroup._groups(Path("/"))
        assert not [each for each in groups if each.name.startswith(f"{guest.pid}-")]
    # The names are free, and there is a new server.
    again, _ = start_both(host, saved)
    assert server_of(again.pid) not in (None, server)
    assert {each["name"] for each in answer("report", "--json")["guests"]} >= set(NAMES)
