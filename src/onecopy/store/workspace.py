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

from onecopy.host.lock import is_held
from onecopy.store.disk import file_errors
from onecopy.store.layout import Layout


@contextmanager
def workspace(layout: Layout) -> Iterator[Path]:
    """A new empty folder, 0700, removed at the end; raises NotEnough, NotPermitted."""
    path = layout.tmp / f"work-{os.urandom(6).hex()}"
    with file_errors(layout.root), layout.locked():
        path.mkdir(mode=0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        remove_tree(path)
        os.close(fd)


def has_leftovers(layout: Layout) -> bool:
    """Whether tmp/ seems to hold remains; sure only under the store's lock."""
    return any(not path.is_dir() or not is_held(path) for path in layout.tmp.iterdir())


def sweep(layout: Layout) -> None:
    """Remove what killed commands left in tmp/; the store's lock is held."""
    for path in layout.tmp.iterdir():
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
        elif not is_held(path):
            remove_tree(path)


def remove_tree(path: Path) -> None:
    """Remove ``path`` and all in it, or as much as can be; the next sweep tries again.

    A folder with something mounted in it is left alone: the mount's content is not ours.
    """
    import shutil

    if _has_mount(path):
        return
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        # Trees of Debian packages have folders that only root may empty as they are.
        for folder, _, _ in os.walk(path):
            Path(folder).chmod(0o700)
        shutil.rmtree(path, ignore_errors=True)


def _has_mount(path: Path) -> bool:
    # proc(5): the fifth field is the mount point, with these four characters in octal.
    wanted = str(path.resolve())
    for char in "\\ \t\n":
        wanted = wanted.replace(char, f"\\{ord(char):03o}")
    mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    points = (line.split(" ")[4] for line in mounts.splitlines())
    return any(point == wanted or point.startswith(f"{wanted}/") for point in points)
