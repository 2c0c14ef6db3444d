"""Directories deeper than any path can name."""

import os
from pathlib import Path


def nest(folder: Path, depth: int, *, mode: int = 0o755) -> None:
    """Folders in one another, whose path is far too long for one name."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("d" * 20, mode, dir_fd=fd)
        deeper = os.open("d" * 20, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=deeper))
        os.close(fd)
        fd = deeper
    os.close(fd)
