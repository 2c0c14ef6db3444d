"""On a disk with nothing left what makes room works, and what only names; for any user.

Root may use blocks that ext4 keeps back, so that a full disk is another one for everybody else.
"""

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from onecopy import cli
from onecopy.errors import InsufficientResources
from onecopy.guest.run_directory import run_root
from onecopy.model import Reference
from onecopy.store import Store
from tests.unit.other_user import NOBODY, as_nobody
from tests.unit.small_disk import ext4, fill_blocks, fill_inodes, tmpfs
from tests.unit.store_kit import check_whole, kills, put

_LINES = [
    *("ls", "ps", "tag app:1 app:9", "tag app:1 other", "rm app:9", "grant app web-*"),
    *(
        "rm app:2 app:3",
        "revoke app web-*",
        "verify app:1",
        "stop --all",
        "disks",
        "rm other app:1",
    ),
]
_DISKS = {
    "tmpfs": lambda folder: tmpfs(folder, "size=4m,nr_inodes=60"),
    "ext4": lambda folder: ext4(folder, 16 << 20, 200),
}


@contextmanager
def _disk(name: str) -> Iterator[Path]:
    # Not tmp_path, which nobody can reach.
    with tempfile.TemporaryDirectory() as folder:
        # Run folders are theirs, too.
        os.chown(folder, NOBODY, NOBODY)
        with _DISKS[name](Path(folder) / "disk") as disk:
            shutil.rmtree(disk / "lost+found", ignore_errors=True)
            os.chown(disk, NOBODY, NOBODY)
            yield disk


def _use(disk: Path, fill: Callable[[Path], object]) -> list[str]:
    """Fill a disk beside a store and use that; what went wrong."""
    os.environ |= {"ONECOPY_HOME": str(disk / "home"), "XDG_RUNTIME_DIR": str(disk.parent)}
    store = Store()
    for number in range(1, 4):
        put(store, f"app:{number}", b"%d" % number * 5000)
    fill(disk)
    wrong = []
    with tempfile.TemporaryFile() as told:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        for line in _LINES:
            code = cli.main(line.split())
            told.seek(0)
            if code:
                wrong.append(f"{line}: {code}: {told.read().decode()}")
        if line == _LINES[-1] and check_whole(disk / "home"):
            wrong.append("something is left")
    return wrong


@pytest.mark.parametrize("fill", [fill_blocks, fill_inodes])
@pytest.mark.parametrize("name", _DISKS)
def test_a_full_store_is_emptied_by_an_ordinary_user(
    name: str, fill: Callable[[Path], object]
) -> None:
    # Another user may not be able to read our files.
    importlib.import_module("onecopy.cli.failures")
    for command in cli.COMMANDS:
        importlib.import_module(f"onecopy.cli.{command}_cmd")
    with _disk(name) as disk:
        assert as_nobody(partial(_use, disk, fill)) == []


def test_a_removal_on_a_full_disk_killed_anywhere_is_done_or_not(tmp_path: Path) -> None:
    root = tmp_path / "home"
    store = Store(root)
    kept, gone = put(store, "app:1", b"1" * 5000), put(store, "app:2", b"2" * 5000)
    seen = set()
    with tmpfs(tmp_path / "disk", "size=1m,nr_inodes=60") as disk:
        copy = disk / "home"

        def make() -> Path:
            for path in disk.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            shutil.copytree(root, copy)
            fill_blocks(disk)
            fill_inodes(disk)
            return copy

        for left in kills(make, lambda: Store(copy).remove(Reference.parse("app:2"))):
            Store(left)
            seen.add(frozenset(check_whole(left).items()))
    one = (kept.ref, kept.digest)
    assert seen == {frozenset({one, (gone.ref, gone.digest)}), frozenset({one})}
    shutil.rmtree(run_root(store), ignore_errors=True)


def test_what_takes_room_is_refused_and_the_reserve_is_made_again(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=4m") as disk:
        store = Store(disk / "home")
        kept, gone = put(store, "app:1", b"1" * 5000), put(store, "app:2", b"2" * 5000)
        filler = fill_blocks(disk)
        with pytest.raises(InsufficientResources):
            store.hold([kept.digest], "web-1")
        assert store.remove(Reference.parse("app:2")).digest == gone.digest
        assert check_whole(disk / "home") == {"app:1": kept.digest}
        filler.unlink()
        put(store, "app:2", b"2" * 5000)
        before = sorted(path.name for path in (disk / "home" / "reserve").iterdir())
        assert before == ["index", "mark"]
        shutil.rmtree(run_root(store), ignore_errors=True)
