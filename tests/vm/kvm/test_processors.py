"""Clones with more processors than were saved; under TCG Linux takes none while it runs."""

from __future__ import annotations

import asyncio

import pytest

from onecopy.errors import TooLarge
from onecopy.guest.lifecycle.resources import ExtraResources
from onecopy.guest.lifecycle.restore import CloneSpec, start_clone, template
from onecopy.guest.runtime import Runtime
from onecopy.store import Artifact
from tests.vm.conftest import RunIn

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
def test_processors_that_came_later_run(host: Runtime, saved: Artifact, run_in: RunIn) -> None:
    source = template(host, saved)
    assert (source.config.cpus, source.config.cpu_room) == (1, 8)
    spec = CloneSpec(fitting=ExtraResources(cpus=3))
    guest = asyncio.run(start_clone(host, source, "wide", spec))
    try:
        assert guest.cpus == 3
        done = run_in(guest, "python3", "-c", WORK)
        ticks = {int(line.split()[0]): int(line.split()[1]) for line in done.text.splitlines()}
        assert ticks.keys() == {0, 1, 2}, done
        assert min(ticks.values()) >= 20
    finally:
        host.end(guest)
    with pytest.raises(TooLarge, match="can have 8"):
        asyncio.run(start_clone(host, source, "wider", CloneSpec(fitting=ExtraResources(cpus=9))))
