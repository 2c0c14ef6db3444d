"""Clones of a system that was saved days ago, and the guest that it was saved from.

Overdue timers do not fire in the clones. The clones get their names and clocks before any saved
program continues, and calendar timers are set again. The saved guest is unchanged. Not here: the
identity of clones (test_identity.py), connections (test_network.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.model import Reference
from onecopy.store import Artifact
from tests.vm.conftest import RunIn
from tests.vm.guests import Guests, open_guests

DAYS = 86400
REF = Reference("old-services")
#: A timer that has fired once before the save, which nothing on disk remembers.
SET_UP = """\
cd /etc/systemd/system
printf '[Service]\\nExecStart=/bin/sh -c "echo ran >>/root/daily"\\n' >daily.service
printf '[Timer]\\nOnCalendar=12:00\\nAccuracySec=1us\\n' >daily.timer
systemctl daemon-reload
day=$(($(date +%s) / 86400 - 2))
for early in 3 30 90; do
    date -u -s "@$((day * 86400 + 12 * 3600 - early))" >/dev/null
    systemctl restart daily.timer
    for try in $(seq $early); do [ -e /root/daily ] || sleep 1; done
    [ ! -e /root/daily ] || break
done
hostname the-users-own
"""
#: What of a guest a save does not change.
STATE = """\
hostname
cat /etc/machine-id /root/daily
systemctl show cron ssh systemd-journald -p MainPID -p ActiveEnterTimestampMonotonic
systemctl list-units --type=timer --state=active --plain --no-legend | cut -d' ' -f1
stat -c '%n %Y' /var/lib/systemd/timers/*
"""
TIMERS = "systemctl list-units --type=timer --state=active --plain --no-legend | cut -d' ' -f1"
#: Timers that do not go by the calendar.
OTHERS = {"systemd-tmpfiles-clean.timer"}
DUE = """\
systemctl show '*.timer' -p NextElapseUSecRealtime --value | while read -r due; do
    [ -z "$due" ] || date -d "$due" +%s || :
done
"""
JOURNAL = "journalctl --no-pager -o json"
CRON_PID = "systemctl show cron -p MainPID --value"
WITHIN = 120


@pytest.fixture(scope="module")
def original(services_root: Artifact) -> Iterator[GuestRecord]:
    """A booted Debian 13 with services, whose clock is two days behind."""
    with open_guests() as guests:
        yield guests.boot(services_root, name="original", memory="256M", timeout=1200).record


def text(run_in: RunIn, guest: GuestRecord, script: str) -> str:
    done = run_in(guest, "sh", "-c", script, timeout=300)
    assert done.exit_code == 0, done
    return done.text


def behind(run_in: RunIn, guest: GuestRecord) -> float:
    return time.time() - float(text(run_in, guest, "date +%s.%N"))


def test_a_system_two_days_old(
    host: Runtime, guests: Guests, original: GuestRecord, run_in: RunIn
) -> None:
    text(run_in, original, SET_UP)
    before, late = text(run_in, original, STATE), behind(run_in, original)
    assert late > 1.5 * DAYS
    guests.save(original, REF)
    try:
        # The guest is as it was, and its timers have not fired again.
        assert text(run_in, original, STATE) == before
        assert abs(behind(run_in, original) - late) < 30
        timers = set(text(run_in, original, TIMERS).split())
        assert {"daily.timer", "dpkg-db-backup.timer", *OTHERS} <= timers
        made = [guest.record for guest in guests.clone(str(REF), 3, name="old")]
        for clone in made:
            assert abs(behind(run_in, clone)) < 30
        for clone in made:
            _armed_again(run_in, clone, timers)
        for clone in made:
            assert text(run_in, clone, "cat /root/daily") == "ran\n"
            _nothing_ran(clone, text(run_in, clone, JOURNAL))
    finally:
        guests.end()
        host.store.remove(REF)


def _armed_again(run_in: RunIn, clone: GuestRecord, timers: set[str]) -> None:
    """They are, each for a moment to come."""
    deadline = time.monotonic() + WITHIN
    while set(text(run_in, clone, TIMERS).split()) != timers:
        assert time.monotonic() < deadline, text(run_in, clone, TIMERS)
        time.sleep(2)
    due = [int(each) for each in text(run_in, clone, DUE).split()]
    assert len(due) >= len(timers) - len(OTHERS)
    assert all(each > time.time() for each in due)


def _nothing_ran(clone: GuestRecord, journal: str) -> None:
    """All that was logged since its start bears its name; timers were armed, and none has fired."""
    entries = [json.loads(line) for line in journal.splitlines()]
    start = next(
        number
        for number, each in enumerate(entries)
        if "crng reseeded due to virtual machine fork" in str(each.get("MESSAGE"))
    )
    since = entries[start:]
    assert {each["_HOSTNAME"] for each in since} == {clone.name}
    assert {each["_HOSTNAME"] for each in entries[:start]} != {clone.name}
    assert [each for each in since if "Started daily.timer" in str(each.get("MESSAGE"))]
    units = {each.get("UNIT") or each.get("_SYSTEMD_UNIT") for each in since}
    ran = {f"{timer.removesuffix('.timer')}.service" for timer in ("daily", "dpkg-db-backup")}
    more = {
        "e2scrub_all.service",
        "apt-daily.service",
        "apt-daily-upgrade.service",
        "fstrim.service",
    }
    assert not units & (ran | more)


def test_cron_does_not_make_up_for_two_hours(
    host: Runtime, guests: Guests, original: GuestRecord, run_in: RunIn
) -> None:
    """Cron runs what it has missed if the clock goes forward by up to three hours (cron(8))."""
    # Not due while this runs.
    minute = (time.gmtime().tm_min + 30) % 60
    job = f"echo '{minute} * * * * root echo ran >>/root/missed' >/etc/cron.d/missed"
    text(run_in, original, f"{job}; date -u -s @{int(time.time()) - 7200}; systemctl restart cron")
    pid = text(run_in, original, CRON_PID)
    guests.save(original, REF)
    try:
        assert text(run_in, original, CRON_PID) == pid
        clone = guests.clone(str(REF), name="missed")[0].record
        # It sees no clock until it is started anew.
        assert text(run_in, clone, f"ps -o stat= -p {pid}").startswith("T")
        deadline = time.monotonic() + WITHIN
        while text(run_in, clone, CRON_PID) in (pid, "0\n"):
            assert time.monotonic() < deadline
            time.sleep(2)
        assert text(run_in, clone, f"ps -o stat= -p $({CRON_PID})").startswith("S")
        assert run_in(clone, "cat", "/root/missed").exit_code
    finally:
        guests.end()
        host.store.remove(REF)
