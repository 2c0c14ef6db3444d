"""Artifacts: in, out, replaced, removed, verified, and many at once."""

import json
import os
import re
import threading
from functools import partial
from pathlib import Path

import pytest

from onecopy.errors import AlreadyExists, InvalidInput, NotFound, StoreDamaged
from onecopy.model import Reference
from onecopy.store import NewLayer, Store
from tests.unit.store_kit import PMEM, blobs, check_whole, digest_of, fork, put

APP = Reference.parse("app:1")


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = put(store, content=b"image")
    assert store.resolve(APP) == artifact
    assert store.resolve(Reference("app", digest=artifact.digest), "segment") == artifact
    assert store.find(APP, "segment") == artifact
    assert store.find(APP, "system") is None
    assert (artifact.kind, artifact.ref, artifact.config) == ("segment", "app:1", b'{"a":1}')
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", artifact.created)
    layer = artifact.layer("image")
    assert layer.path.is_absolute()
    assert layer.path.read_bytes() == b"image"
    assert (layer.digest, layer.size, artifact.size) == (digest_of(b"image"), 5, 5)
    with pytest.raises(StoreDamaged, match="no 'kernel' layer"):
        artifact.layer("kernel")
    assert check_whole(tmp_path) == {"app:1": artifact.digest}


def test_the_manifest_on_disk(tmp_path: Path) -> None:
    artifact = put(Store(tmp_path), content=b"image")
    path = tmp_path / "blobs" / "sha256" / artifact.digest.removeprefix("sha256:")
    assert json.loads(path.read_bytes()) == {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": "application/vnd.onecopy.segment.v1+json",
        "config": {
            "mediaType": "application/vnd.onecopy.segment.config.v1+json",
            "digest": digest_of(b'{"a":1}'),
            "size": 7,
        },
        "layers": [
            {
                "mediaType": PMEM,
                "digest": digest_of(b"image"),
                "size": 5,
                "annotations": {"org.onecopy.role": "image"},
            }
        ],
    }


def test_the_same_source_gives_the_same_digest_and_one_copy(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = put(store, "app:1")
    before = first.layers[0].path.stat()
    second = put(store, "other:2")
    assert second.digest == first.digest
    assert second.layers[0].path.stat() == before
    assert put(store, "app:1") == first
    assert put(store, "app:1", replace=False) == first
    assert len(blobs(tmp_path)) == 3
    assert put(Store(tmp_path / "sub" / "elsewhere")).digest == first.digest


def test_a_sparse_file_stays_sparse(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.workspace() as work:
        with (work / "ram").open("wb") as file:
            file.truncate(64 << 20)
            file.write(b"start")
        layer = NewLayer(work / "ram", PMEM, size=64 << 20)
        blob = store.put("system", APP, b"{}", [layer]).layers[0]
    assert blob.path.stat().st_size == 64 << 20
    assert blob.path.stat().st_blocks * 512 < 1 << 20


def test_replace(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, content=b"old")
    with pytest.raises(AlreadyExists):
        put(store, content=b"new", replace=False)
    with pytest.raises(AlreadyExists, match="is a segment"):
        put(store, content=b"new", kind="system")
    assert store.resolve(APP).layers[0].digest == digest_of(b"old")
    new = put(store, content=b"new")
    assert check_whole(tmp_path) == {"app:1": new.digest}


def test_artifacts_are_sorted_and_by_kind(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for ref, kind in (("b:1", "segment"), ("a:2", "system"), ("a:1", "segment")):
        put(store, ref, ref.encode(), kind=kind)
    assert [artifact.ref for artifact in store.artifacts()] == ["a:1", "a:2", "b:1"]
    assert [artifact.ref for artifact in store.artifacts("segment")] == ["a:1", "b:1"]
    assert store.artifacts("kernel") == []


def test_remove(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, "app:1", b"one")
    two = put(store, "app:2", b"two")
    with pytest.raises(NotFound):
        store.remove(Reference("app", digest=digest_of(b"other")))
    assert store.remove(APP).ref == "app:1"
    assert check_whole(tmp_path) == {"app:2": two.digest}
    with pytest.raises(NotFound):
        store.remove(APP)
    put(store, "app:3", b"two")
    assert store.remove(Reference("app", digest=two.digest)) == two
    assert check_whole(tmp_path) == {}


def test_what_cannot_be_put(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.workspace() as work:
        file = work / "file"
        file.write_bytes(b"x")
        (work / "link").symlink_to(file)
        gone = digest_of(b"gone")
        for layer, error in (
            (NewLayer(None, PMEM), InvalidInput),
            (NewLayer(file, PMEM, digest=digest_of(b"x")), InvalidInput),
            (NewLayer(file, PMEM, size=2), StoreDamaged),
            (NewLayer(work, PMEM), InvalidInput),
            (NewLayer(work / "link", PMEM), InvalidInput),
            (NewLayer(work / "none", PMEM), NotFound),
            (NewLayer(None, PMEM, digest=gone), NotFound),
            (NewLayer(None, PMEM, digest="sha256:../../index.json"), InvalidInput),
        ):
            with pytest.raises(error):
                store.put("segment", APP, b"{}", [layer])
        with pytest.raises(InvalidInput, match="kind"):
            store.put("disk", APP, b"{}", [NewLayer(file, PMEM)])
        with pytest.raises(InvalidInput, match="new name"):
            store.put("segment", Reference("app", digest=gone), b"{}", [NewLayer(file, PMEM)])
        assert file.read_bytes() == b"x"
    assert check_whole(tmp_path) == {}


def test_a_failed_put_takes_back_what_it_moved(tmp_path: Path) -> None:
    store = Store(tmp_path)
    other = Path("/dev/shm") / f"onecopy-test-{os.getpid()}"
    other.write_bytes(b"on another file system")
    try:
        with store.workspace() as work:
            (work / "first").write_bytes(b"first")
            layers = [NewLayer(work / "first", PMEM), NewLayer(other, PMEM)]
            with pytest.raises(InvalidInput, match="not on the file system") as error:
                store.put("segment", APP, b"{}", layers)
        assert "workspace" in error.value.hint
    finally:
        other.unlink()
    assert check_whole(tmp_path) == {}


@pytest.mark.parametrize("which", ["manifest", "config", "layer"])
@pytest.mark.parametrize("damage", ["changed", "longer", "missing"])
def test_verify_names_the_damaged_blob_and_rm_and_put_repair_it(
    tmp_path: Path, which: str, damage: str
) -> None:
    store = Store(tmp_path)
    artifact = put(store)
    store.verify(artifact)
    digest = {
        "manifest": artifact.digest,
        "config": digest_of(artifact.config),
        "layer": artifact.layers[0].digest,
    }[which]
    path = tmp_path / "blobs" / "sha256" / digest.removeprefix("sha256:")
    path.chmod(0o644)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data + b"\n" if damage == "longer" else b"X" + data[1:])
    with pytest.raises(StoreDamaged, match=path.name) as error:
        store.verify(artifact)
    assert "onecopy rm app:1" in error.value.hint
    if which != "layer":
        with pytest.raises(StoreDamaged, match=path.name):
            Store(tmp_path).resolve(APP)
    assert Store(tmp_path).remove(APP).digest == artifact.digest
    store.verify(put(store))
    check_whole(tmp_path)


def test_a_damaged_manifest_gives_nobody_elses_blobs_away(tmp_path: Path) -> None:
    store = Store(tmp_path)
    damaged, fine = put(store, "app:1", b"one"), put(store, "app:2", b"two")
    path = tmp_path / "blobs" / "sha256" / damaged.digest.removeprefix("sha256:")
    path.chmod(0o644)
    path.write_bytes(b"{}")
    before = blobs(tmp_path)
    with pytest.raises(StoreDamaged):
        store.collect()
    with pytest.raises(StoreDamaged):
        store.artifacts()
    assert store.remove(Reference.parse("app:2")) == fine
    # Nothing can be collected while it is not known what the damaged one needs.
    assert blobs(tmp_path) == before
    store.remove(APP)
    assert check_whole(tmp_path) == {}


def test_a_corrupt_index_is_named_and_costs_no_blob(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store)
    before = blobs(tmp_path)
    (tmp_path / "index.json").write_bytes(b'{"schemaVersion": 2, "manif')
    (tmp_path / "tmp" / "change").touch()
    store = Store(tmp_path)
    for attempt in (
        lambda: store.resolve(APP),
        lambda: store.artifacts(),
        lambda: store.remove(APP),
        lambda: store.collect(),
        lambda: put(store, "app:2", b"two"),
    ):
        with pytest.raises(StoreDamaged, match=r"index\.json") as error:
            attempt()
        assert "backup" in error.value.hint
    assert before <= blobs(tmp_path)


def test_eight_processes_put_at_once_and_none_is_lost(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def work(number: int) -> None:
        mine = Store(tmp_path)
        for turn in range(5):
            # Half of the layers are the same everywhere.
            put(mine, f"app-{number}:{turn}", b"shared" if turn % 2 else b"%d" % number)

    children = [fork(partial(work, number)) for number in range(8)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert {artifact.ref for artifact in store.artifacts()} == {
        f"app-{number}:{turn}" for number in range(8) for turn in range(5)
    }
    assert len(check_whole(tmp_path)) == 40


def test_readers_never_see_a_half_change(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, "still:1", b"still")

    def write() -> None:
        mine = Store(tmp_path)
        for turn in range(60):
            put(mine, "app:1", b"%d" % turn)
            if turn % 3 == 0:
                mine.remove(APP)

    child = fork(write)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        refs = [artifact.ref for artifact in store.artifacts()]
        assert refs in (["still:1"], ["app:1", "still:1"])
    assert check_whole(tmp_path).keys() == {"app:1", "still:1"}


def test_threads_share_one_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    threads = [
        threading.Thread(target=put, args=(store, f"app:{number}", b"%d" % number))
        for number in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(check_whole(tmp_path)) == 6
