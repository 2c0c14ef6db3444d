"""`build_segment` with a real store: what is recorded, and that failures leave nothing."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from onecopy.errors import BadSource, InvalidInput
from onecopy.images.build import BuildOptions, build_segment
from onecopy.model import HUGE_PAGE_SIZE, Reference
from onecopy.store.store import Store
from tests.conftest import cannot_run

REF = Reference.parse("app:v1")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree/sbin").mkdir(parents=True)
    (tmp_path / "tree/sbin/init").touch(0o755)
    return tmp_path / "tree"


def remains(store: Store) -> list[Path]:
    """Blobs, and whatever lies in a workspace."""
    return [*store.root.glob("blobs/sha256/*"), *store.root.glob("tmp/*/*")]


def test_a_segment_and_its_record(store: Store, tree: Path) -> None:
    steps: list[str] = []
    made = build_segment(store, REF, f"dir:{tree}", progress=steps.append)
    assert (made.kind, made.ref) == ("segment", "app:v1")
    layer = made.layer("image")
    assert layer.media_type == "application/vnd.onecopy.image.v1+erofs"
    assert json.loads(made.config) == {
        "schema": 2,
        "ranges": [{"class": "SR", "size": layer.size, "fs": "erofs"}],
        "source": "dir",
        "include": [],
        "init": "/sbin/init",
        "parent": "",
    }
    assert layer.path.stat().st_size == layer.size == HUGE_PAGE_SIZE
    assert len(steps) >= 2
    store.verify(made)


def test_the_same_source_is_the_same_artifact(store: Store, tree: Path, tmp_path: Path) -> None:
    first = build_segment(store, REF, f"dir:{tree}")
    tree.rename(tmp_path / "moved")
    time.sleep(1.1)
    again = build_segment(store, Reference.parse("other"), f"dir:{tmp_path}/moved")
    assert again.digest == first.digest


def test_a_segment_without_init(store: Store, tree: Path) -> None:
    (tree / "sbin/init").chmod(0o644)
    assert json.loads(build_segment(store, REF, f"dir:{tree}").config)["init"] is None


def test_bad_input_is_refused_before_the_store_is_touched(store: Store, tree: Path) -> None:
    by_digest = Reference.parse("app@sha256:" + "0" * 64)
    with pytest.raises(InvalidInput):
        build_segment(store, by_digest, f"dir:{tree}")
    with pytest.raises(InvalidInput):
        build_segment(store, REF, f"dir:{tree}", BuildOptions(fs="xfs"))
    with pytest.raises(InvalidInput):
        build_segment(store, REF, f"dir:{tree}", BuildOptions(include=("python3",)))
    with pytest.raises(BadSource):
        build_segment(store, REF, f"dir:{tree}/missing")
    assert not remains(store)


@pytest.mark.parametrize("fs", ["erofs", "ext2"])
def test_an_interrupted_build_leaves_nothing(store: Store, tree: Path, fs: str) -> None:
    if fs == "ext2" and os.geteuid() != 0:
        cannot_run("ext2 images need root")
    (tree / "big").touch()
    os.truncate(tree / "big", 400 << 20)

    def interrupt_soon(step: str) -> None:
        if step.startswith("writing"):
            signal.setitimer(signal.ITIMER_REAL, 0.1)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build_segment(store, REF, f"dir:{tree}", BuildOptions(fs=fs), progress=interrupt_soon)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not remains(store)
    assert not list(store.root.glob("tmp/*"))
    assert not [line for line in programs() if os.fspath(store.root) in line]
    assert os.fspath(store.root) not in Path("/proc/self/mounts").read_text()


def programs() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found
