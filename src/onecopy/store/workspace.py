"""Workspaces: private directories on the store's file system, for unfinished work.

The owner holds an flock(2) on the directory, which distinguishes it from the directory of a killed
command.

Not here: how results get into the store (store.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onecopy.linux.lock import flock, is_held
from onecopy.linux.removal import remove_tree
from onecopy.store.disk import file_errors
from onecopy.store.layout import Layout
from onecopy.store.leftovers import tolerate_failure, warn


@contextmanager
def workspace(layout: Layout) -> Iterator[Path]:
    """Create an empty directory with mode 0700, removed at the end of the context.

    Raises:
        InsufficientResources: the disk is full.
        NotPermitted: this user may not change the store.
    """
    path = layout.tmp / f"work-{os.urandom(6).hex()}"
    with file_errors(layout.root), layout.locked():
        path.mkdir(mode=0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        flock(fd)
    try:
        yield path
    finally:
        warn(path, remove_tree(path))
        os.close(fd)


def has_leftovers(layout: Layout) -> bool:
    """Whether tmp/ seems to contain leftovers; certain only under the store's lock."""
    for path in layout.tmp.iterdir():
        with tolerate_failure(path):
            if path.is_symlink() or not path.is_dir() or not is_held(path):
                return True
    return False


def sweep(layout: Layout) -> None:
    """Remove what killed commands left in tmp/; the caller holds the store's lock.

    Anything that cannot be removed stays, with a warning (leftovers.py).
    """
    for path in layout.tmp.iterdir():
        with tolerate_failure(path):
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
            elif not is_held(path):
                warn(path, remove_tree(path))
