"""A segment is replaced while guests use it: guests with the old version keep it to their end."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

from onecopy.guest.observe.inspect import describe
from onecopy.guest.runtime import Runtime
from onecopy.images.build import build_segment
from onecopy.model import Reference
from onecopy.store import Artifact
from tests.vm.conftest import Clones, RunIn
from tests.vm.segments import load

REF = Reference("text")


def build(host: Runtime, folder: Path, text: str) -> Artifact:
    folder.mkdir(exist_ok=True)
    (folder / "text").write_text(text)
    return build_segment(host.store, REF, f"dir:{folder}")


def next_command(host: Runtime) -> None:
    """What the next command sweeps; a store that cannot be swept says why."""
    Runtime.open(host.store.root)
    host.store.collect()


def test_three_versions_at_once(
    host: Runtime, clones: Clones, run_in: RunIn, tmp_path: Path
) -> None:
    guests, versions = clones(3), []
    for number, guest in enumerate(guests):
        versions.append(build(host, tmp_path / "source", f"version {number}"))
        load(host, guest, "text:/srv")
    for number, guest in enumerate(guests):
        told = run_in(guest, "cat", "/srv/text").stdout.decode()
        assert told == f"version {number}"
    old, middle, new = versions
    assert host.store.resolve(REF).digest == new.digest
    pending = {artifact.digest: artifact for artifact in host.store.pending()}
    assert pending.keys() == {old.digest, middle.digest}
    told_of = describe(host.store, pending[old.digest], pending=True)
    assert (told_of["state"], told_of["users"]) == ("P", [guests[0].name])
    assert (told_of["name"], told_of["version"]) == ("text", "latest")

    # However its last user ends: killed, or stopped.
    pidfd = os.pidfd_open(guests[0].pid)
    os.kill(guests[0].pid, signal.SIGKILL)
    # All its threads: one that is left holds the lease.
    select.select([pidfd], [], [])
    os.close(pidfd)
    next_command(host)
    assert not old.layer("image").path.exists()
    assert [artifact.digest for artifact in host.store.pending()] == [middle.digest]
    assert run_in(guests[1], "cat", "/srv/text").stdout == b"version 1"
    host.end(guests[1])
    next_command(host)
    assert not middle.layer("image").path.exists()
    assert run_in(guests[2], "cat", "/srv/text").stdout == b"version 2"


def test_removed_while_in_use(host: Runtime, clones: Clones, run_in: RunIn, tmp_path: Path) -> None:
    (guest,) = clones(1)
    segment = build(host, tmp_path / "source", "soon gone")
    load(host, guest, "text:/srv")
    host.store.remove(REF, in_use=True)
    assert host.store.find(REF, "segment") is None
    assert [artifact.digest for artifact in host.store.pending()] == [segment.digest]
    assert run_in(guest, "cat", "/srv/text").stdout == b"soon gone"
    host.end(guest)
    next_command(host)
    assert not segment.layer("image").path.exists()
