"""Removing what others made: deep, wide, unreadable, mounted on; and a sweep that goes on."""

import os
import resource
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecopy.linux.removal import remove_tree
from onecopy.store import Store
from tests.conftest import cannot_run
from tests.unit.deep_tree import nest
from tests.unit.other_user import as_nobody

DEPTH = 1200


def test_deeper_than_any_path(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    nest(tree, DEPTH)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 6, before[1]))
    try:
        assert remove_tree(tree) == ""
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not list(tmp_path.iterdir())


def test_everything_that_a_folder_can_hold(tmp_path: Path) -> None:
    tree, beside = tmp_path / "tree", tmp_path / "beside"
    beside.mkdir()
    (beside / "mine").touch()
    (tree / "a/b/c").mkdir(parents=True)
    for number in range(1500):
        (tree / f"a/{number}").mkdir()
        (tree / f"a/{number}/file").touch()
    (tree / "link").symlink_to(beside)
    (tree / "a/hard").hardlink_to(beside / "mine")
    os.mkfifo(tree / "pipe")
    (tree / "-rf\n\x1b").touch()
    Path(os.fsdecode(os.fsencode(tree) + b"/\xff")).mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "s"))
    assert remove_tree(tree) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["beside"]
    assert (beside / "mine").exists()


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    assert remove_tree(tmp_path / "link") == ""
    assert remove_tree(tmp_path / "gone") == remove_tree(tmp_path / "no/such") == ""
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_folders_that_their_owner_cannot_use() -> None:
    def remove() -> list[object]:
        with tempfile.TemporaryDirectory() as home:
            tree = Path(home) / "tree"
            (tree / "a/b").mkdir(parents=True)
            (tree / "a/b/file").touch()
            for folder in (tree / "a/b", tree / "a", tree):
                folder.chmod(0)
            return [remove_tree(tree), tree.exists()]

    assert as_nobody(remove) == ["", False]


@pytest.mark.parametrize("where", ["tree/m", "tree"])
def test_a_mount_is_left_alone(tmp_path: Path, where: str) -> None:
    if os.geteuid() != 0:
        cannot_run("only root can mount")
    (tmp_path / "tree/m").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "x", tmp_path / where], check=True)
    try:
        (tmp_path / where / "file").touch()
        assert "mounted" in remove_tree(tmp_path / "tree")
        assert (tmp_path / where / "file").exists()
    finally:
        subprocess.run(["umount", tmp_path / where], check=True)
    assert remove_tree(tmp_path / "tree") == ""


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[Store]:
    """A store with a leftover that nobody can remove."""
    store = Store(tmp_path / "store")
    folder = store.root / "tmp/work-0"
    (folder / "a/b").mkdir(parents=True)
    (folder / "a/b/file").touch()
    (folder / "z").touch()
    if subprocess.run(["chattr", "+i", folder / "a/b"], check=False).returncode:
        cannot_run("this file system has no immutable files")
    yield store
    subprocess.run(["chattr", "-i", folder / "a/b"], check=True)


def test_a_leftover_that_stays_is_told_once(stuck: Store, caplog: pytest.LogCaptureFixture) -> None:
    """It keeps no command from working, and nothing else from going."""
    other = stuck.root / "tmp/work-1"
    other.mkdir()
    for _ in range(2):
        again = Store(stuck.root)
        with again.workspace() as work:
            nest(work, DEPTH)
    assert not other.exists()
    assert [path.name for path in (stuck.root / "tmp").iterdir()] == ["work-0"]
    assert not (stuck.root / "tmp/work-0/z").exists()
    assert len(caplog.messages) == 1
    assert "work-0" in caplog.messages[0]
    assert "not permitted" in caplog.messages[0]


@pytest.mark.parametrize("kind", ["fifo", "socket", "link", "deep"])
def test_odd_leftovers_go(tmp_path: Path, kind: str) -> None:
    store = Store(tmp_path / "store")
    odd = store.root / "tmp/odd"
    if kind == "fifo":
        os.mkfifo(odd)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(odd))
    elif kind == "link":
        odd.symlink_to("/")
    else:
        odd.mkdir()
        nest(odd, DEPTH)
    Store(store.root)
    assert not list((store.root / "tmp").iterdir())
