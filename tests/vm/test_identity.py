"""Each clone is a machine of its own: hostname, machine-id, random numbers; also with systemd.

Not here: what clones share (test_sharing_clones.py).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import pytest

from onecopy.guest.boot import ColdSpec
from onecopy.guest.folder import GuestRecord
from onecopy.guest.host import Host
from onecopy.guest.many import start_many
from onecopy.guest.save import save_system
from onecopy.guest.start import start_clone, template
from onecopy.model import MIB, Reference
from onecopy.store import Artifact
from tests.vm.conftest import RunIn

NAMES = ["own-1", "own-2"]


@pytest.fixture
def two(host: Host, systemd_root: Artifact) -> Iterator[list[GuestRecord]]:
    """Two clones of a saved Debian with systemd."""
    spec = ColdSpec(root=Reference.parse(systemd_root.ref), memory=256 * MIB)
    source = template(host, asyncio.run(save_system(host, Reference("own"), spec)))
    started = asyncio.run(
        start_many(host, NAMES, lambda name, batch: start_clone(host, source, name, batch=batch))
    )
    yield list(started.guests)
    for guest in started.guests:
        host.end(guest)
    host.store.remove(Reference("own"))


def test_clones_of_a_systemd_guest(two: list[GuestRecord], run_in: RunIn) -> None:
    def said(*argv: str) -> list[str]:
        done = [run_in(guest, *argv) for guest in two]
        assert [each.exit_code for each in done] == [0, 0], done
        return [each.stdout.decode().strip() for each in done]

    assert said("hostname") == NAMES
    ids = said("cat", "/etc/machine-id")
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)
    assert len(set(ids)) == 2
    assert len(set(said("cat", "/proc/sys/kernel/random/uuid"))) == 2
    assert said("systemctl", "is-system-running") == ["running"] * 2
    assert said("cat", "/proc/1/comm") == ["systemd"] * 2
