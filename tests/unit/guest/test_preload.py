"""warm: what is loaded, recorded, dropped; by mincore over real files."""

import json
import os
import subprocess
import time
from pathlib import Path

import msgspec
import pytest

from onecopy import cli
from onecopy.errors import NotPermitted
from onecopy.guest.pagecache import access_record, preload
from onecopy.linux import prefetch
from onecopy.linux.counters import residency
from onecopy.model import PAGE_SIZE, Reference
from onecopy.store import Artifact, Store
from tests.conftest import cannot_run
from tests.unit.store_kit import put

PAGES = 256
SIZE = PAGES * PAGE_SIZE


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    kind = subprocess.run(["stat", "-fc", "%T", tmp_path], capture_output=True, text=True)
    if kind.stdout.strip() in ("tmpfs", "ramfs"):
        cannot_run("the temporary folder is memory: its pages cannot be dropped")
    monkeypatch.setenv("ONECOPY_HOME", str(tmp_path / "store"))
    return Store()


@pytest.fixture
def cold(store: Store) -> Artifact:
    """A segment of which nothing is in memory."""
    artifact = put(store, "app:1", os.urandom(SIZE))
    preload.drop(store, artifact)
    assert pages(artifact) == bytes(PAGES)
    return artifact


def pages(artifact: Artifact) -> bytes:
    found = residency.resident_pages(artifact.layers[0].path)
    assert found is not None
    return found


def record_of(store: Store) -> Path:
    [path] = store.cache.glob("touched-*.json")
    return path


def test_extents_of_pages() -> None:
    assert access_record.extents_of(b"", 0) == []
    assert access_record.extents_of(bytes(9), 9 * PAGE_SIZE) == []
    assert access_record.extents_of(b"\1" * 3, 2 * PAGE_SIZE + 5) == [(0, 2 * PAGE_SIZE + 5)]
    far = b"\1\0\0\0\0\0\1\1"
    assert access_record.extents_of(far, 8 * PAGE_SIZE) == [
        (0, PAGE_SIZE),
        (6 * PAGE_SIZE, 2 * PAGE_SIZE),
    ]
    near = b"\0\1\0\0\0\0\1"
    assert access_record.extents_of(near, 7 * PAGE_SIZE) == [(PAGE_SIZE, 6 * PAGE_SIZE)]


def test_load_waits_until_it_is_there(cold: Artifact) -> None:
    prefetch.load(cold.layers[0].path, [(0, SIZE)])
    assert pages(cold) == b"\1" * PAGES


def test_only_what_is_recorded_is_loaded(store: Store, cold: Artifact) -> None:
    access_record.write(store, cold.layers[0], [(PAGE_SIZE * 64, PAGE_SIZE * 10)])
    [told] = preload.warm(store, cold)
    assert pages(cold) == bytes(64) + b"\1" * 10 + bytes(PAGES - 74)
    assert (told.action, told.requested_bytes) == ("recorded", 10 * PAGE_SIZE)
    assert (told.before, told.after) == (0, 10 * PAGE_SIZE)
    [told] = preload.warm(store, cold, whole=True)
    assert pages(cold) == b"\1" * PAGES
    assert (told.action, told.before, told.after) == ("whole", 10 * PAGE_SIZE, SIZE)


def test_all_is_loaded_if_nothing_is_recorded(store: Store, cold: Artifact) -> None:
    [told] = preload.warm(store, cold)
    assert (told.action, told.requested_bytes, told.after) == ("whole", SIZE, SIZE)


def test_holes_are_not_loaded(store: Store) -> None:
    artifact = put(store, "sparse:1", os.urandom(PAGE_SIZE) + bytes(SIZE))
    subprocess.run(["fallocate", "--dig-holes", artifact.layers[0].path], check=True)
    preload.drop(store, artifact)
    [told] = preload.warm(store, artifact)
    assert told.requested_bytes < SIZE
    assert not any(pages(artifact)[told.requested_bytes // PAGE_SIZE :])


def test_record_and_load_again(store: Store, cold: Artifact) -> None:
    prefetch.load(cold.layers[0].path, [(0, PAGE_SIZE), (PAGE_SIZE * 128, PAGE_SIZE)])
    had = pages(cold)
    [told] = preload.record(store, cold)
    assert (told.action, told.requested_bytes) == ("recorded", sum(had) * PAGE_SIZE)
    preload.drop(store, cold)
    preload.begin(store, cold.layers)
    deadline = time.monotonic() + 60
    while any(old > new for old, new in zip(had, pages(cold), strict=True)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    preload.drop(store, cold)
    preload.warm(store, cold)
    assert sum(pages(cold)) >= sum(had)


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 2},
        {"digest": "sha256:" + "0" * 64},
        {"size": SIZE + 1},
        {"extents": [[-PAGE_SIZE, PAGE_SIZE]]},
        {"extents": [[1, PAGE_SIZE]]},
        {"extents": [[0, 0]]},
        {"extents": [[0, SIZE + 1]]},
        {"extents": [[PAGE_SIZE, PAGE_SIZE], [0, PAGE_SIZE]]},
        {"extents": [[0, 1 << 70]]},
        {"extents": "all"},
    ],
)
def test_a_record_that_is_wrong_is_none(
    store: Store, cold: Artifact, damage: dict[str, object]
) -> None:
    layer = cold.layers[0]
    access_record.write(store, layer, [(0, PAGE_SIZE)])
    path = record_of(store)
    right = json.loads(path.read_bytes())
    path.write_text(json.dumps({**right, "new": [1]}))
    assert access_record.read(store, layer) == [(0, PAGE_SIZE)]
    path.write_text(json.dumps({**right, **damage}))
    assert access_record.read(store, layer) is None


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100000])
def test_a_record_that_is_damaged_is_none(store: Store, cold: Artifact, data: bytes) -> None:
    access_record.write(store, cold.layers[0], [(0, PAGE_SIZE)])
    record_of(store).write_bytes(data)
    assert access_record.read(store, cold.layers[0]) is None
    preload.begin(store, cold.layers)


def test_begin_needs_no_record_and_no_blob(store: Store, cold: Artifact) -> None:
    preload.begin(store, cold.layers)
    assert not any(pages(cold))
    access_record.write(store, cold.layers[0], [(0, PAGE_SIZE)])
    cold.layers[0].path.unlink()
    preload._begin([(cold.layers[0].path, [(0, PAGE_SIZE)])])


def test_records_of_removed_blobs_go(store: Store, cold: Artifact) -> None:
    preload.record(store, cold)
    store.remove(Reference("app", "1"))
    other = put(store, "other:1", b"other")
    preload.record(store, other)
    record = msgspec.json.decode(record_of(store).read_bytes(), type=access_record.Touched)
    assert record.digest == other.layers[0].digest


def test_another_user_cannot_record(
    store: Store, cold: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "resident_pages", lambda _: None)
    with pytest.raises(NotPermitted):
        preload.record(store, cold)


def test_the_command(cold: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preload", "app:1"]) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split()[-4:] == ["WHAT", "WANTED", "BEFORE", "AFTER"]
    assert line.split()[5:] == ["whole", "1.0", "MiB", "0", "B", "1.0", "MiB"]
    assert cli.main(["preload", "--drop", "--json", "app:1"]) == 0
    [told] = json.loads(capsys.readouterr().out)
    assert (told["before"], told["after"]) == (SIZE, 0)
    assert cli.main(["preload", "--drop", "--record", "app:1"]) == 2
    assert cli.main(["preload", "nothing"]) == 3
