"""The time of a guest, of which that in which it waits for processors is hardly counted."""

import os
import subprocess
import sys
import time

from onecopy.guest.fair_time import FairTime

BUSY = "import os\nos.sched_setaffinity(0, {%d})\nprint(flush=True)\nwhile True: pass"


def test_time_of_a_process_that_waits_for_a_processor() -> None:
    """Four share one: each is to have about four times as long."""
    code = BUSY % min(os.sched_getaffinity(0))
    busy = [subprocess.Popen([sys.executable, "-c", code], stdout=-1) for _ in range(4)]
    try:
        for each in busy:
            assert each.stdout
            each.stdout.readline()
        fair, began = FairTime(busy[0].pid, 0.5), time.monotonic()
        while pause := fair.pause():
            time.sleep(pause)
        assert time.monotonic() - began > 1.0
        assert not fair.rests()
    finally:
        for each in busy:
            each.kill()
            each.wait()
            assert each.stdout
            each.stdout.close()


def test_time_of_a_process_that_rests() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        fair, began = FairTime(sleeper.pid, 1.5), time.monotonic()
        assert not fair.rests()
        while pause := fair.pause():
            assert pause <= 0.25
            time.sleep(pause)
        assert time.monotonic() - began > 1.4
        assert fair.rests()
        sleeper.kill()


def test_time_of_a_process_that_is_gone() -> None:
    """It passes as on any clock."""
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    fair, began = FairTime(gone.pid, 0.3), time.monotonic()
    while pause := fair.pause():
        time.sleep(pause)
    assert time.monotonic() - began >= 0.3
