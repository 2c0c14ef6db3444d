"""Workspaces: private folders in the store's own file system, for what is still being made.

The owner holds an flock(2) on the folder, so the folder of a killed command can be told from one in
use. Not here: how the result gets into the store (store.py).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onecopy.linux.lock import is_held
from onecopy.linux.removal import remove_tree
from onecopy.store.disk import file_errors
from onecopy.store.layout import Layout
from onecopy.store.leftovers import going_on, tell


@contextmanager
def workspace(layout: Layout) -> Iterator[Path]:
    """A new empty folder, 0700, removed at the end; raises InsufficientResources, NotPermitted."""
    path = layout.tmp / f"work-{os.urandom(6).hex()}"
    with file_errors(layout.root), layout.locked():
        path.mkdir(mode=0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        tell(path, remove_tree(path))
        os.close(fd)


def has_leftovers(layout: Layout) -> bool:
    """Whether tmp/ seems to hold remains; sure only under the store's lock."""
    for path in layout.tmp.iterdir():
        with going_on(path):
            if path.is_symlink() or not path.is_dir() or not is_held(path):
                return True
    return False


def sweep(layout: Layout) -> None:
    """Remove what killed commands left in tmp/; the store's lock is held.

    What cannot be removed stays, and is told (leftovers.py).
    """
    for path in layout.tmp.iterdir():
        with going_on(path):
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
            elif not is_held(path):
                tell(path, remove_tree(path))
