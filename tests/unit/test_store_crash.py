"""Whatever is killed, wherever it is: the old or the new is there, whole, and nothing else."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from onecopy.model import Reference
from onecopy.store import Store
from tests.unit.store_kit import blobs, check_whole, fork, killed_at, put

OLD, NEW = b"old" * 5000, b"new" * 5000


@pytest.fixture
def fast(tmp_path: Path) -> Path:
    """A folder in memory if there is one: these tests sync thousands of times."""
    return tmp_path


def kill_at_each_line(root: Path, change: Callable[[Store], object]) -> set[frozenset[str]]:
    """Kill ``change`` before every line of the store that it runs; each set of names that remains.

    Every round begins with a fresh copy of ``root``.
    """
    seen = set()
    for step in count(1):
        copy = root.parent / f"{root.name}-copy"
        shutil.copytree(root, copy)
        store = Store(copy)
        killed = killed_at(step, lambda store=store: change(store))  # type: ignore[misc]
        Store(copy)
        names = check_whole(copy)
        assert list((copy / "leases").iterdir()) == []
        seen.add(frozenset(f"{name} {digest}" for name, digest in names.items()))
        shutil.rmtree(copy)
        if not killed:
            assert step > 50
            return seen
    raise AssertionError


def names_of(*artifacts: object) -> frozenset[str]:
    return frozenset(f"{a.ref} {a.digest}" for a in artifacts)  # type: ignore[attr-defined]


def test_put_killed_anywhere_is_whole_or_absent(tmp_path: Path) -> None:
    old = put(Store(tmp_path / "a"), "app:1", OLD)
    new = put(Store(tmp_path / "b"), "app:2", NEW)
    seen = kill_at_each_line(tmp_path / "a", lambda store: put(store, "app:2", NEW))
    assert seen == {names_of(old), names_of(old, new)}


def test_replace_killed_anywhere_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    old = put(Store(tmp_path / "a"), "app:1", OLD)
    new = put(Store(tmp_path / "b"), "app:1", NEW)
    seen = kill_at_each_line(tmp_path / "a", lambda store: put(store, "app:1", NEW))
    assert seen == {names_of(old), names_of(new)}


def test_remove_killed_anywhere(tmp_path: Path) -> None:
    store = Store(tmp_path / "a")
    first, second = put(store, "app:1", OLD), put(store, "app:2", NEW)
    seen = kill_at_each_line(
        tmp_path / "a", lambda store: store.remove(Reference.parse("app:2"))
    )
    assert seen == {names_of(first, second), names_of(first)}


def test_hold_killed_anywhere_leaves_no_lease(tmp_path: Path) -> None:
    artifact = put(Store(tmp_path / "a"))
    seen = kill_at_each_line(
        tmp_path / "a", lambda store: store.hold([artifact.digest], "web-1")
    )
    assert seen == {names_of(artifact)}
