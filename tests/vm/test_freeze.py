"""The segment script in a guest: frozen writes, and the processes that hold a segment.

Not here: the host's use of it (test_commit.py, test_attach.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.images.build import BuildOptions, build_segment
from onecopy.model import Reference
from tests.vm.conftest import Clones, RunIn
from tests.vm.segments import load

SEGMENT = "/run/onecopy/tools/bin/busybox sh /run/onecopy/tools/segment"
THAWED, BUSY = 14, 16


@pytest.fixture
def guest(host: Runtime, clones: Clones, tmp_path: Path) -> GuestRecord:
    """A guest with a segment "notes" that it may write, mounted on /notes."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/page").write_text("a page\n")
    build_segment(host.store, Reference("notes"), f"dir:{tmp_path}/notes", BuildOptions(fs="ext2"))
    (guest,) = clones(1)
    load(host, guest, "notes:/notes", exclusive=True)
    return guest


def sh(run_in: RunIn, guest: GuestRecord, script: str) -> tuple[int, list[str]]:
    done = run_in(guest, "sh", "-c", script.replace("SEGMENT", SEGMENT))
    return done.exit_code, done.stdout.decode().splitlines()


def test_who_writes_waits_for_the_thaw(guest: GuestRecord, run_in: RunIn) -> None:
    script = """
        SEGMENT freeze notes 60
        (echo new >/notes/file; echo written >>/tmp/order) & sleep 1
        SEGMENT freeze notes 60; echo "again: $?"
        SEGMENT unplugged notes; echo "unplugged: $?"
        echo thaw >>/tmp/order
        SEGMENT thaw notes; echo "thaw: $?"
        wait; cat /tmp/order
    """
    _, said = sh(run_in, guest, script)
    expected = [f"again: {BUSY}", "- frozen", f"unplugged: {BUSY}", "thaw: 0", "thaw", "written"]
    assert said == expected


def test_a_freeze_ends_by_itself_and_says_so(guest: GuestRecord, run_in: RunIn) -> None:
    assert sh(run_in, guest, "SEGMENT freeze notes 1; echo new >/notes/file") == (0, [])
    assert sh(run_in, guest, "SEGMENT thaw notes")[0] == THAWED
    # Nothing of it is left.
    assert sh(run_in, guest, "SEGMENT freeze notes 60; SEGMENT thaw notes") == (0, [])


def test_a_freeze_is_not_ended_by_the_watchdog_of_one_before(
    guest: GuestRecord, run_in: RunIn
) -> None:
    # The first one is held up, and looks again only once the second freeze is there.
    script = """
        SEGMENT freeze notes 2; sleep 0.5
        watchdog=$(/run/onecopy/tools/applets/ps | grep '[s]egment watch notes 2')
        kill -STOP ${watchdog% root *} || exit
        SEGMENT thaw notes; SEGMENT freeze notes 60; kill -CONT ${watchdog% root *}; sleep 4
    """
    assert sh(run_in, guest, script)[0] == 0
    assert sh(run_in, guest, "SEGMENT thaw notes")[0] == 0


def test_what_is_mounted_nowhere_needs_no_freeze(guest: GuestRecord, run_in: RunIn) -> None:
    script = "umount /notes; SEGMENT freeze notes 60; SEGMENT thaw notes"
    assert sh(run_in, guest, script) == (0, [])


@pytest.mark.parametrize(
    "hold",
    [
        "cd /notes",
        "exec 5</notes/page",
        "exec 5</dev/onecopy/notes",
        # Only mapped, like a library that is in use: its descriptor is closed.
        "exec python3 -c \"import mmap, os, time; f = os.open('/notes/page', 0);"
        "m = mmap.mmap(f, 7, prot=1); os.close(f); print('holds', flush=True); time.sleep(999)\"",
    ],
)
def test_whoever_holds_it_is_named_and_nobody_else(
    guest: GuestRecord, run_in: RunIn, hold: str
) -> None:
    script = f"""
        cat >/tmp/hold <<'END'
        {hold}
        echo holds
        read -r _ </tmp/wait
END
        mkfifo /tmp/wait /tmp/ready
        sh /tmp/hold >/tmp/ready & holder=$!
        read -r _ </tmp/ready
        SEGMENT unplugged notes >/tmp/said; echo "$?"
        read -r pid name </tmp/said; [ "$pid" = "$holder" ] && [ -n "$name" ] && wc -l </tmp/said
        cat /notes/page
        kill $holder; wait
        SEGMENT unplugged notes; echo "$?"; ls /dev/onecopy /notes | grep -e notes$ -e page
    """
    assert sh(run_in, guest, script)[1][:4] == [str(BUSY), "1", "a page", "0"]


def test_what_the_caller_has_open_is_the_callers(guest: GuestRecord, run_in: RunIn) -> None:
    code, said = sh(run_in, guest, "exec 5</notes/page; echo $$; SEGMENT unplugged notes")
    assert code == BUSY
    assert said == [said[0], f"{said[0]} sh"]


def test_mounts_of_a_container(guest: GuestRecord, run_in: RunIn) -> None:
    script = """
        mkfifo /tmp/ready
        unshare --mount sh -c 'echo >/tmp/ready; exec sleep 999' & sleeper=$!
        read -r _ </tmp/ready
        SEGMENT unplugged notes; echo "$?"
        kill $sleeper; wait
        SEGMENT unplugged notes; echo "$?"
    """
    _, said = sh(run_in, guest, script)
    assert said[0].endswith(" sleep")
    assert said[1:] == [str(BUSY), "0"]
