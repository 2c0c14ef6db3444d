"""Clones with more vCPUs than were saved; under TCG a running Linux cannot add vCPUs."""

from __future__ import annotations

import pytest

from onecopy.errors import TooLarge
from onecopy.guest.machine import SystemConfig
from onecopy.store import Artifact
from tests.vm.guests import Guests

#: Prints how many clock ticks each processor has worked while it was the only one allowed.
WORK = """
import os, time
for cpu in sorted(os.sched_getaffinity(0)):
    os.sched_setaffinity(0, [cpu])
    def user():
        line = next(l for l in open("/proc/stat") if l.startswith(f"cpu{cpu} "))
        return int(line.split()[1])
    before, end = user(), time.monotonic() + 5
    while user() - before < 20 and time.monotonic() < end:
        sum(range(10000))
    print(cpu, user() - before)
"""


@pytest.mark.smoke
def test_processors_that_came_later_run(guests: Guests, saved: Artifact) -> None:
    config = SystemConfig.of(saved)
    assert (config.cpus, config.cpu_room) == (1, 8)
    (guest,) = guests.clone(saved, cpus=3)
    assert guest.record.cpus == 3
    done = guest.exec(["python3", "-c", WORK])
    ticks = {int(line.split()[0]): int(line.split()[1]) for line in done.text.splitlines()}
    assert ticks.keys() == {0, 1, 2}, done
    assert min(ticks.values()) >= 20
    with pytest.raises(TooLarge, match="can have at most 8"):
        guests.clone(saved, cpus=9)
