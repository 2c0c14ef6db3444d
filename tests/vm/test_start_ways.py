"""Which way a guest's QEMU was started, as commands and the Python API tell it; and what is counted
of a fork server.

Not here: what a forked VMM may do, and what the end of its server means for it.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from onecopy.guest.observe import doctor
from onecopy.guest.observe.accounts import report_of
from onecopy.guest.runtime import Runtime
from onecopy.linux.counters import smaps
from onecopy.sharing import cross_check
from onecopy.store import Artifact
from onecopy.vmm import external_qemu, fork_probe, fork_registry
from onecopy.vmm.fork_probe import Library
from onecopy.vmm.fork_registry import Server
from tests.command import answer, onecopy
from tests.vm import forks
from tests.vm.guests import Guests

TOLD = "gcc is not installed, which fork servers need: apt-get install gcc libc6-dev"


def server_of(pid: int) -> Server:
    """The record of a VMM's server, one of those that the host may have."""
    server = forks.server_of(pid)
    (found,) = [each for each in fork_registry.running() if each.process.pid == server]
    return found


def test_each_way_is_told(
    host: Runtime, guests: Guests, saved: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    (forked,) = guests.clone(saved, name="forked")
    (isolated,) = guests.clone(saved, name="isolated", isolated_vmm=True)
    monkeypatch.setattr(fork_probe, "find", lambda *_: Library(None, TOLD))
    (fallen,) = guests.clone(saved, name="fallen")
    wanted = {"forked": (True, ""), "isolated": (False, "requested"), "fallen": (False, TOLD)}
    for guest in (forked, isolated, fallen):
        told = answer("inspect", guest.name)
        assert (told["forked"], told["why_exec"]) == wanted[guest.name]
        assert (guest.forked, guest.record.why_exec) == wanted[guest.name]
        assert guest.exec(["hostname"]).text == f"{guest.name}\n"
        # Only a child of the server has its memory: its pages are mapped by the server, too.
        rollup = answer("inspect", guest.name)["account"]
        assert rollup["note"] == ""
    rows = {row["name"]: (row["forked"], row["why_exec"]) for row in answer("ps", "--json")}
    assert wanted.items() <= rows.items()
    printed = onecopy("ps", "--filter", "name=forked", "--format", "{{.name}} {{.forked}}").stdout
    assert printed == "forked true\n"
    # The table has a line for what was not asked for.
    assert f"no fork server: {TOLD}" in onecopy("ps").stdout
    fallen.stop()
    assert "no fork server" not in onecopy("ps").stdout


def test_doctor_tells_it(host: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._forking(host.qemu, host).state == "ok"
    monkeypatch.setattr(fork_probe, "find", lambda *_, **__: Library(None, TOLD))
    found = doctor._forking(host.qemu, host)
    assert (found.check, found.state) == ("fork server", "limited")
    assert TOLD in found.says


def test_report_counts_the_server_apart(host: Runtime, guests: Guests, saved: Artifact) -> None:
    pids = {each.record.pid for each in guests.clone(saved, 2)}
    (server,) = {server_of(pid).process.pid for pid in pids}
    told: dict[str, Any] = answer("report", "--check", "--json")
    assert server in {each["pid"] for each in told["servers"]}
    assert pids <= {each["pid"] for each in told["guests"]}
    assert server not in {each["pid"] for each in (*told["guests"], *told["others"])}
    assert server not in {each.pid for each in external_qemu.find(()).vmms}
    assert "FORK SERVER" in onecopy("report").stdout
    names = {row["pid"] for row in answer("ps", "--json")}
    assert server not in names


def test_an_older_server_adds_up(host: Runtime, guests: Guests, saved: Artifact) -> None:
    """The server was there before the first guest. Then it is killed, and its pages stay."""
    server = server_of(guests.clone(saved)[0].record.pid)
    guests.end()
    assert host.guests() == []
    noted = cross_check.look(fork_registry.pids()).servers
    started = [each.record for each in guests.clone(saved, 4)]
    assert {server_of(each.pid) for each in started} == {server}
    assert cross_check.read(host.memory_before).servers
    # Each page of what is new, once: what the guests have that the server does not have.
    alive = checked(host)
    rollups = [smaps.read_rollup(each.pid) for each in started]
    shares = sum(each.anonymous + each.shared_memory for each in rollups if each)
    older = sum(each.own for each in noted)
    assert alive < shares
    os.kill(server.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while server.process.lives():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # Guests run on, and have all of the server's pages now.
    assert checked(host) == pytest.approx(alive, abs=older / 4, rel=0.03)
    assert {each.name for each in started} <= {row["name"] for row in answer("ps", "--json")}
    # That command has removed the server's files.
    key = server.path.name.partition("=")[0]
    assert not list(fork_registry.directory().glob(f"{key}*"))
    onecopy("exec", started[0].name, "true")


def checked(host: Runtime) -> int:
    """The memory of QEMU in `report --check`, once it does not change any more."""
    before = cross_check.read(host.memory_before)
    found, deadline = -1, time.monotonic() + 120
    while True:
        told = cross_check.check(before, report_of(host.guests())).processes
        if abs(told - found) < told / 200:
            return told
        assert time.monotonic() < deadline
        found = told
        time.sleep(1)
