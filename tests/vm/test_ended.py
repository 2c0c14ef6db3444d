"""Guests that end on their own, each in its way: `ps -a`, `logs` and others report the reason.

Not here: how each init ends a guest (test_ends.py); a host out of memory (test_out_of_memory.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from onecopy.guest.end import Cause
from onecopy.guest.ended_guests import path
from onecopy.guest.lifecycle.batch import start_many
from onecopy.guest.lifecycle.start import start_one
from onecopy.guest.lifecycle.stop import stop_guests, wait_for_end
from onecopy.guest.run_directory import GuestRecord, RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.linux import vmm_registry
from onecopy.model import MIB
from onecopy.store import Artifact
from onecopy.vmm.monitor import connect
from tests.command import answer, onecopy
from tests.vm.conftest import Clones
from tests.vm.guests import boot_plan, clone_plan

STUCK = 120.0
#: Guest -> what ends it: a clone's own doing, what its command is, or what its QEMU meets.
DOES = {
    "panics": "echo c >/proc/sysrq-trigger",
    "resets": "echo b >/proc/sysrq-trigger",
    "reboots": "/run/onecopy/tools/bin/busybox reboot -f",
    "off": "/run/onecopy/tools/bin/busybox poweroff -f",
    "halts": "/run/onecopy/tools/bin/busybox halt -f",
}
COMMANDS = {
    "done": "while ! [ -e /end ]; do sleep 0.2; done; echo my last words; exit 7",
    # It is the command itself that grows.
    "hungry": "while ! [ -e /end ]; do sleep 0.2; done; exec tail /dev/zero",
}
SIGNALS = {"killed": signal.SIGKILL, "asked": signal.SIGTERM}
QUITS = "quits"
EXPECTED = {
    "panics": (Cause.PANIC, "kernel panic: sysrq triggered crash", None),
    "resets": (Cause.REBOOTED, "rebooted", None),
    "reboots": (Cause.REBOOTED, "rebooted", None),
    "off": (Cause.POWERED_OFF, "powered off", None),
    "halts": (Cause.HALTED, "halted", None),
    "done": (Cause.COMMAND, "its command ended with exit code 7", 7),
    "hungry": (Cause.OUT_OF_MEMORY, "out of memory: the guest's kernel killed its command", 137),
    "killed": (Cause.KILLED, "QEMU was killed (SIGKILL), or crashed without a message", None),
    "asked": (Cause.KILLED, f"QEMU was ended by signal 15 from pid {os.getpid()}", None),
    "quits": (Cause.KILLED, "QEMU got a quit command on its monitor", None),
}


async def quit_by_monitor(folder: Path) -> None:
    async with connect(folder) as monitor:
        await monitor.execute("quit")


@pytest.fixture(scope="module")
def various(host: Runtime, saved: Artifact, busybox_root: Artifact) -> dict[str, GuestRecord]:
    """All of them, started together."""
    source = clone_plan(host, saved)
    booted = {
        name: boot_plan(host, busybox_root.ref, memory=128 * MIB, command=command)
        for name, command in COMMANDS.items()
    }
    plans = [(name, booted.get(name, source)) for name in EXPECTED]
    starts = {name: partial(start_one, host, plan, name) for name, plan in plans}
    started = asyncio.run(start_many(host, starts))
    return {each.name: each for each in started.guests}


@pytest.fixture(scope="module")
def ended(host: Runtime, various: dict[str, GuestRecord]) -> Iterator[dict[str, GuestRecord]]:
    """All of them, ended; their records as a command finds them."""
    from onecopy.guest.exec import run_captured

    uids = [each.uid for each in host.on_record()]
    assert len(uids) == len(EXPECTED)
    try:
        for name, line in DOES.items():
            line = f"echo 1 >/proc/sys/kernel/sysrq; (sleep 1; {line}) >/dev/null 2>&1 &"
            argv = ["sh", "-c", line]
            assert asyncio.run(run_captured(host.run / name, argv)).exit_code == 0
        for name in COMMANDS:
            assert asyncio.run(run_captured(host.run / name, ["touch", "/end"])).exit_code == 0
        for name, number in SIGNALS.items():
            os.kill(various[name].pid, number)
        asyncio.run(quit_by_monitor(host.run / QUITS))
        for guest in various.values():
            assert asyncio.run(wait_for_end(guest, STUCK)), guest.name
        found = answer("ps", "-a", "--json")
        known = {record.name: record for record in host.ended()}
        assert {each["name"] for each in found if each["ended"]} == known.keys()
        yield known
    finally:
        host.end(*various.values())
        host.forget(*various)


def test_each_is_told_as_what_it_was(ended: dict[str, GuestRecord]) -> None:
    ends = {name: each.ended for name, each in ended.items() if each.ended}
    told = {name: (end.cause, end.reason, end.exit_code) for name, end in ends.items()}
    assert told == EXPECTED
    # QEMU notes when, if it can.
    assert {name for name, end in ends.items() if end.at is None} == {"killed"}
    for name, end in ends.items():
        assert ended[name].started < (end.at or end.found) <= end.found


def test_ps(ended: dict[str, GuestRecord]) -> None:
    lines = {line.split()[0]: line for line in onecopy("ps", "-a").stdout.splitlines()}
    for name, (_, reason, _) in EXPECTED.items():
        found = "found ended" if name == "killed" else "  ended"
        assert lines[name].endswith(reason) and found in lines[name]
    plain = onecopy("ps")
    assert not set(EXPECTED) & set(plain.stdout.split())
    assert f"{len(EXPECTED)} guests have ended: `onecopy ps --all`" in plain.stderr
    quiet = onecopy("ps", "--json")
    assert (json.loads(quiet.stdout), quiet.stderr) == ([], "")


def test_what_they_printed_last(ended: dict[str, GuestRecord]) -> None:
    crashed = onecopy("logs", "panics")
    assert "sysrq: Trigger a crash" in crashed.stdout and "Call Trace" in crashed.stdout
    assert crashed.stderr == "onecopy: panics has ended: kernel panic: sysrq triggered crash\n"
    assert "my last words" in onecopy("logs", "--follow", "done").stdout
    assert "Killed process" in onecopy("logs", "hungry").stdout
    assert "terminating on signal 15" in onecopy("logs", "--qemu", "asked").stdout


@pytest.mark.parametrize("argv", [("console", "panics"), ("attach", "panics", "busybox")])
def test_other_commands_say_that_it_has_ended(
    ended: dict[str, GuestRecord], argv: tuple[str, ...]
) -> None:
    said = onecopy(*argv, code=3).stderr
    assert "panics has ended: kernel panic: sysrq triggered crash" in said
    assert "onecopy logs panics" in said


def test_exec_and_inspect(ended: dict[str, GuestRecord]) -> None:
    assert "has ended: rebooted" in onecopy("exec", "reboots", "true", code=125).stderr
    shown = answer("inspect", "done")
    assert (shown["ended"]["exit_code"], shown["account"]) == (7, None)


def test_no_more_than_that_is_left(host: Runtime, ended: dict[str, GuestRecord]) -> None:
    assert host.folders() == []
    assert list((host.store.root / "leases").iterdir()) == []
    # Their user numbers may be given out again: no file of theirs is left.
    assert vmm_registry.of_store(host.run.name) == []
    for name in ended:
        files = {each.name: each.stat() for each in path(host.run, name).iterdir()}
        assert files.keys() == {"guest.json", "console.log", "qemu.log"}
        assert {each.st_uid for each in files.values()} == {os.geteuid()}
        assert sum(each.st_size for each in files.values()) < 20_000


def test_they_are_removed(host: Runtime, saved: Artifact, ended: dict[str, GuestRecord]) -> None:
    said = onecopy("stop", "panics", "done").stdout
    assert said.splitlines() == [
        "panics had ended: kernel panic: sysrq triggered crash",
        "done had ended: its command ended with exit code 7",
    ]
    assert onecopy("rm", "killed").stdout == "killed removed: it had ended\n"
    onecopy("stop", "killed", code=3)
    # The name is free, and a guest that has it takes the place of what was kept.
    onecopy("run", "--name", "asked", saved.ref)
    assert "asked" not in {each.name for each in host.ended()}
    assert "is a running guest" in onecopy("rm", "asked", code=3).stderr
    assert onecopy("stop", "asked").stdout == "asked shut down\n"
    assert {each.name for each in host.ended()} == ended.keys() - {
        *("panics", "done", "killed", "asked")
    }
    onecopy("rm", "--ended")
    assert host.ended() == []
    assert not path(host.run, "x").parent.exists()


def test_nothing_is_kept_of_what_is_stopped(
    host: Runtime, clones: Clones, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if another command sees it ended before `stop` does."""
    (guest,) = clones(1)
    looked = []

    async def wait(record: GuestRecord, patience: float | None = None) -> bool:
        found = await wait_for_end(record, patience)
        if found:
            Runtime.open(host.store.root)
            looked.append(RunDirectory(host.run / record.name).path.exists())
        return found

    monkeypatch.setattr("onecopy.guest.lifecycle.stop.wait_for_end", wait)
    asyncio.run(stop_guests(host, [guest]))
    assert looked and not any(looked)
    assert host.ended() == []
