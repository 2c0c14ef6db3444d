"""Whatever is killed, wherever it is: the old or the new is there, whole, and nothing else."""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onecopy.model import Reference
from onecopy.store import Access, Artifact, Store
from tests.unit.store_kit import check_whole, fork, kills, put

MEMORY = Path("/dev/shm")
APP = Reference.parse("app:1")
OLD, NEW = b"old" * 5000, b"new" * 5000


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory, if that can be: thousands of rounds wait for no disk, and kills need none."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def copies(root: Path) -> Callable[[], Path]:
    """Makes fresh copies of ``root``, each in the place of the one before."""
    copy = root.with_name("copy")

    def make() -> Path:
        shutil.rmtree(copy, ignore_errors=True)
        return Path(shutil.copytree(root, copy))

    return make


def kill_everywhere(root: Path, change: Callable[[Store], object]) -> set[frozenset[str]]:
    """Kill ``change`` of a copy of ``root`` at each state; every set of names that is left."""
    seen = set()
    for copy in kills(copies(root), lambda: change(Store(root.with_name("copy")))):
        Store(copy)
        names = check_whole(copy)
        assert list((copy / "leases").iterdir()) == []
        seen.add(frozenset(f"{name} {digest}" for name, digest in names.items()))
    return seen


def names_of(*artifacts: Artifact) -> frozenset[str]:
    return frozenset(f"{artifact.ref} {artifact.digest}" for artifact in artifacts)


def test_put_killed_anywhere_is_whole_or_absent(tmp_path: Path) -> None:
    old = put(Store(tmp_path / "a"), "app:1", OLD)
    new = put(Store(tmp_path / "b"), "app:2", NEW)
    seen = kill_everywhere(tmp_path / "a", lambda store: put(store, "app:2", NEW))
    assert seen == {names_of(old), names_of(old, new)}


def test_replace_killed_anywhere_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    old = put(Store(tmp_path / "a"), "app:1", OLD)
    new = put(Store(tmp_path / "b"), "app:1", NEW)
    seen = kill_everywhere(tmp_path / "a", lambda store: put(store, "app:1", NEW))
    assert seen == {names_of(old), names_of(new)}


def test_remove_killed_anywhere_leaves_all_or_nothing_of_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "a")
    kept, gone = put(store, "app:1", OLD), put(store, "app:2", NEW)
    ref = Reference.parse("app:2")
    seen = kill_everywhere(tmp_path / "a", lambda store: store.remove(ref))
    assert seen == {names_of(kept, gone), names_of(kept)}


def test_hold_killed_anywhere_leaves_no_lease(tmp_path: Path) -> None:
    artifact = put(Store(tmp_path / "a"))
    seen = kill_everywhere(tmp_path / "a", lambda store: store.hold([artifact.digest], "web-1"))
    assert seen == {names_of(artifact)}


def test_extend_killed_anywhere_leaves_no_lease(tmp_path: Path) -> None:
    artifact = put(Store(tmp_path / "a"))

    def change(store: Store) -> None:
        with store.hold([artifact.digest], "web-1") as main:
            (main.files / "blob").hardlink_to(store.resolve(APP).layers[0].path)
            store.extend("web-1", [artifact.digest])

    assert kill_everywhere(tmp_path / "a", change) == {names_of(artifact)}


def test_tag_into_another_domain_killed_anywhere(tmp_path: Path) -> None:
    def change(store: Store) -> Artifact:
        return store.tag(APP, Reference.parse("copy:1"), domain="lab")

    old = put(Store(tmp_path / "a"), "app:1", OLD)
    put(Store(tmp_path / "b"), "app:1", OLD)
    new = change(Store(tmp_path / "b"))
    seen = kill_everywhere(tmp_path / "a", change)
    assert seen == {names_of(old), names_of(old, new)}


def test_a_restriction_survives_what_is_killed_anywhere(tmp_path: Path) -> None:
    """Never for a moment is a restricted name free for all."""
    root, copy = tmp_path / "a", tmp_path / "copy"
    store = Store(root)
    put(store, "app:1", OLD)
    before, after = Access(restricted=True), Access(restricted=True, grants=("web-*",))
    store.restrict("app", lambda _: before)

    def change() -> None:
        mine = Store(copy)
        put(mine, "app:1", NEW)
        mine.restrict("app", lambda _: after)

    seen = []
    for left in kills(copies(root), change):
        access = Store(left).access("app")
        if access not in seen:
            seen.append(access)
        check_whole(left)
    assert seen == [before, after]


def test_first_opening_killed_anywhere(tmp_path: Path) -> None:
    root = tmp_path / "fresh" / "store"

    def make() -> Path:
        shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
        return root

    for left in kills(make, lambda: Store(root)):
        Store(left)
        assert check_whole(left) == {}


@pytest.mark.parametrize("workspace", [False, True])
def test_sweep_killed_anywhere_is_finished_by_the_next(tmp_path: Path, workspace: bool) -> None:
    root, copy = tmp_path / "a", tmp_path / "copy"
    store = Store(root)
    with store.hold([put(store, "app:1", OLD).digest], "web-1"):
        new = put(store, "app:1", NEW)
    # Left now: a stale lease and blobs that only it keeps, which nothing else gives away.
    if workspace:
        (root / "tmp" / "work-x").mkdir()
        (root / "tmp" / "work-x" / "half").write_bytes(b"half")
    for left in kills(copies(root), lambda: Store(copy)):
        Store(left)
        assert check_whole(left) == {new.ref: new.digest}
        assert list((left / "leases").iterdir()) == []


def test_workspace_of_a_killed_command_is_swept_and_a_live_one_is_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    reading, writing = os.pipe()

    def work() -> None:
        with store.workspace() as folder:
            (folder / "deep").mkdir(mode=0o500)
            (folder / "file").write_bytes(b"half")
            os.write(writing, os.fsencode(folder))
            signal.pause()

    child = fork(work)
    try:
        folder = Path(os.fsdecode(os.read(reading, 4096)))
        Store(tmp_path)
        assert (folder / "file").exists()
    finally:
        os.close(reading)
        os.close(writing)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    Store(tmp_path)
    assert check_whole(tmp_path) == {}
    assert not folder.exists()
