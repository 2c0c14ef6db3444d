"""Preloading with real guests: the pages that they access are recorded, and read for the next."""

from __future__ import annotations

import time

from onecopy.guest.pagecache import preload
from onecopy.guest.pagecache.access_record import extents_of
from onecopy.guest.pagecache.mapped import Users
from onecopy.guest.runtime import Runtime
from onecopy.linux import prefetch
from onecopy.linux.counters import residency, smaps
from onecopy.model import MIB, PAGE_SIZE
from onecopy.store import Artifact, Layer
from tests.vm.conftest import Boot, Clones, RunIn
from tests.vm.guests import boot_plan

MEMORY = 192 * MIB
NEARLY = 0.9


def resident(layer: Layer) -> bytes:
    found = residency.resident_pages(layer.path)
    assert found is not None
    return found


def drop(layers: list[Layer]) -> None:
    for layer in layers:
        prefetch.drop(layer.path)
        assert not any(resident(layer))


def until_resident(layer: Layer, wanted: bytes) -> None:
    """Wait until nearly all pages that ``wanted`` has were in memory: nobody says when it is done.

    Some may have gone before we look, in a few seconds: where the host reclaims what it thinks cold
    (DAMON).
    """
    deadline = time.monotonic() + 60
    missing = {page for page, there in enumerate(wanted) if there}
    while len(missing) > sum(wanted) * (1 - NEARLY):
        assert time.monotonic() < deadline, f"{len(missing)} of {sum(wanted)} pages never came"
        now = resident(layer)
        missing = {page for page in missing if not now[page]}
        time.sleep(0.05)
    print(f"there: all but {len(missing)} of {sum(wanted)} pages")


def test_a_cold_guest_is_recorded_and_loaded(
    host: Runtime, boot: Boot, run_in: RunIn, python_root: Artifact
) -> None:
    artifacts = boot_plan(host, python_root.ref, memory=MEMORY, command="").artifacts
    layers = [layer for artifact in artifacts for layer in artifact.layers]
    image = python_root.layer("image")
    drop(layers)
    guest = boot(python_root, memory=MEMORY)
    assert run_in(guest, "python3", "-c", "import json").exit_code == 0
    host.end(guest)
    touched = resident(image)
    told = [each for artifact in artifacts for each in preload.record(host.store, artifact)]
    print(f"touched, read-ahead included: {sum(touched)} of {len(touched)} pages")
    assert any(touched)

    # The command: all that was touched, before any guest.
    drop(layers)
    assert [each.action for each in preload.warm(host.store, python_root)] == ["recorded"]
    until_resident(image, touched)

    # A guest by itself: also what it does not touch is there, if it is on record.
    assert len(told) == len({layer.digest for layer in layers})
    preload.warm(host.store, python_root, whole=True)
    preload.record(host.store, python_root)
    whole = resident(image)
    assert sum(touched) < sum(whole) * NEARLY
    drop(layers)
    guest = boot(python_root, memory=MEMORY)
    until_resident(image, whole)
    host.end(guest)


def test_what_a_guest_touched_of_what_is_all_in_memory(
    host: Runtime, boot: Boot, run_in: RunIn, python_root: Artifact
) -> None:
    image = python_root.layer("image")
    preload.warm(host.store, python_root, whole=True)
    guest = boot(python_root, memory=MEMORY)
    assert run_in(guest, "cat", "/etc/debian_version").exit_code == 0
    (told,) = preload.record(host.store, python_root, Users(host, python_root))
    mapped = sum(m.rss for m in smaps.read(guest.pid) if m.path == str(image.path))
    assert told.action == "touched"
    assert 0 < mapped <= told.requested_bytes + PAGE_SIZE
    assert told.after is not None
    assert told.requested_bytes < told.after / 4
    host.end(guest)

    # Of what no guest has mapped it is what is in memory.
    (told,) = preload.record(host.store, python_root, Users(host, python_root))
    assert (told.action, told.requested_bytes > mapped) == ("recorded", True)


def test_a_clone_s_ram_is_loaded(host: Runtime, clones: Clones, saved: Artifact) -> None:
    ram = saved.layer("ram")
    drop(list(saved.layers))
    host.end(*clones(1))
    touched = resident(ram)
    preload.record(host.store, saved)
    assert any(touched)

    # Not by the clone, which maps what it touches: what no clone has touched.
    other = bytes(1 - page for page in touched)
    assert any(other)
    prefetch.drop(ram.path)
    prefetch.load(ram.path, extents_of(other, ram.size))
    preload.record(host.store, saved)
    wanted = resident(ram)
    assert any(wanted)
    drop(list(saved.layers))
    (guest,) = clones(1)
    until_resident(ram, wanted)
    host.end(guest)
