"""Clones of a system that was saved two days ago: overdue timers do not fire in them.

The clocks of the guest and of the saving command are set back. Not here: clones of a new system
(tests/vm/test_identity.py).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec

import onecopy
from onecopy.guest.runtime import Runtime
from onecopy.linux import process
from onecopy.model import Reference
from tests.workloads import places
from tests.workloads.catalogue import AGED
from tests.workloads.tap import Lost

#: Seconds by which the system is older than its clones.
AGE = 2 * 24 * 3600
#: Seconds after the hand-out in which nothing that was due may run.
WATCHED = 30.0
_SYSTEM = Reference("aged-system", "saved")
_FRESH = Reference("aged-system", "fresh")
#: Runs a command of ours with a clock that is wrong by as many seconds as its first argument says.
_BACK = """\\
import sys, time
by, *sys.argv[1:] = sys.argv[1:]
now, now_ns = time.time, time.time_ns
time.time = lambda: now() - int(by)
time.time_ns = lambda: now_ns() - int(by) * 10**9
from onecopy.__main__ import main
main()
"""
#: Sets the clock of a guest back, and lets timers forget when they were last due.
_SET_BACK = f"""\
timers=$(systemctl list-unit-files --type timer --state enabled --no-legend | cut -d " " -f 1)
systemctl stop $timers
rm -f /var/lib/systemd/timers/*
date -s @$(($(date +%s) - {AGE})) >&2
systemctl start $timers
systemctl list-timers --all >&2
for n in $(seq 60); do
    systemctl list-jobs | grep -q "No jobs" && exit
    sleep 1
done
exit 1
"""
_JOURNAL = "journalctl --sync; journalctl -b -o json --all"


class Clone(msgspec.Struct, frozen=True):
    """What became of one clone."""

    name: str
    ran: list[str]
    """Units that were due and ran."""
    wrong_names: list[str]
    """Lines of its journal that have another name."""


class Campaign(msgspec.Struct, frozen=True):
    """32 clones of an old system, compared with clones of a fresh one."""

    accel: str
    clones: list[Clone]
    seconds: float
    """Until all were handed out."""
    fresh_seconds: float
    memory: float
    """Bytes of a VMM's own, in the middle."""
    fresh_memory: float

    def wrong(self) -> list[str]:
        """What speaks against it; empty if all is as it must be."""
        found = [f"{c.name} ran {', '.join(c.ran)}" for c in self.clones if c.ran]
        lines = [(c.name, line) for c in self.clones for line in c.wrong_names]
        return [*found, *(f"{name} logged {line}" for name, line in lines)]


def run(host: Runtime, count: int, accel: str = "auto") -> Campaign:
    """Start ``count`` clones of a fresh system, and of one that is two days old; watch the latter.

    Raises Lost if a guest does not do what it is told.
    """
    with onecopy.Host(host.store.root) as api:
        try:
            known = _save(api, host.store.root, accel)
            with _clones(api, _FRESH, count, accel) as (_, fresh_seconds, fresh_memory):
                pass
            with (
                ThreadPoolExecutor(4) as pool,
                _clones(api, _SYSTEM, count, accel) as (guests, seconds, memory),
            ):
                time.sleep(WATCHED)
                looked = list(pool.map(lambda guest: _look(guest, known), guests))
                used = guests[0].record.accel
        finally:
            for ref in (_FRESH, _SYSTEM):
                if host.store.find(ref, "system"):
                    host.store.remove(ref)
    return Campaign(used, looked, seconds, fresh_seconds, memory, fresh_memory)


def _save(api: onecopy.Host, home: Path, accel: str) -> set[str]:
    """Save one guest twice: as it is, and with the clocks set back.

    Returns the cursors of its own journal, which is in its clones, too.
    """
    root = f"{AGED.name}:{AGED.suite}"
    with api.boot(root, accel=accel, timeout=1200) as [guest]:
        guest.save(str(_FRESH))
        places.in_guest(guest, _SET_BACK, 300)
        env = {**os.environ, "ONECOPY_HOME": str(home)}
        argv = [sys.executable, "-c", _BACK, str(AGE), "save", "--from", guest.name, str(_SYSTEM)]
        done = subprocess.run(argv, capture_output=True, text=True, env=env)
        if done.returncode:
            raise Lost(f"the old system is not saved: {done.stderr}")
        return {line["__CURSOR"] for line in _journal(guest)}


def _journal(guest: onecopy.Guest) -> list[dict[str, str]]:
    text = places.in_guest(guest, _JOURNAL, 600)
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@contextmanager
def _clones(
    api: onecopy.Host, system: Reference, count: int, accel: str
) -> Iterator[tuple[list[onecopy.Guest], float, float]]:
    """Clones; the seconds until they were handed out, and what a VMM has in the middle (bytes)."""
    began = time.monotonic()
    with api.start(str(system), count, accel=accel) as guests:
        seconds = time.monotonic() - began
        time.sleep(5)
        memory = statistics.median(
            process.memory(guest.record.pid).anonymous or 0 for guest in guests
        )
        yield guests, seconds, memory


def _look(guest: onecopy.Guest, known: set[str]) -> Clone:
    """What a clone's journal says beside the lines that it has from its saved system."""
    timers = places.in_guest(guest, "ls /usr/lib/systemd/system /etc/systemd/system", 300)
    due = {name.removesuffix(".timer") for name in timers.split() if name.endswith(".timer")}
    own = [line for line in _journal(guest) if line["__CURSOR"] not in known]
    if not due or not own:
        raise Lost(f"{guest.name} has {len(due)} timers, and {len(own)} lines in its journal")
    started = {line.get("UNIT", "") for line in own if line.get("JOB_TYPE") == "start"}
    wrong = [
        f"{line.get('MESSAGE')} as {line.get('_HOSTNAME')}"
        for line in own
        if line.get("_HOSTNAME") != guest.name
    ]
    return Clone(
        guest.name, sorted(unit for unit in started if unit.removesuffix(".service") in due), wrong
    )
