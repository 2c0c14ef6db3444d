"""File systems that are soon full: in memory, and ext4 in a file."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from tests.conftest import cannot_run


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A small file system in memory, mounted on ``folder``."""
    with _mounted(folder, ["-t", "tmpfs", "-o", options, "tmpfs"]):
        yield folder


@contextmanager
def ext4(folder: Path, size: int, inodes: int) -> Iterator[Path]:
    """An ext4 of ``size`` bytes with the blocks that it keeps for root."""
    image = folder.with_suffix(".ext4")
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(
        ["/sbin/mke2fs", "-q", "-t", "ext4", "-m", "5", "-N", str(inodes), image], check=True
    )
    with _mounted(folder, ["-o", "loop", str(image)]):
        yield folder
    image.unlink()


@contextmanager
def _mounted(folder: Path, options: Sequence[str]) -> Iterator[None]:
    if os.geteuid():
        cannot_run("only root can mount a file system")
    folder.mkdir()
    argv = ["/bin/mount", *options, str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        cannot_run(f"mount: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["/bin/umount", "--lazy", folder], check=True)


def fill_blocks(folder: Path) -> Path:
    """Write a file in ``folder`` until nothing is left for this user."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with suppress(OSError):
                while file.write(b"f" * size):
                    pass
            os.fsync(file.fileno())
    return filler


def fill_inodes(folder: Path) -> None:
    """Make files in ``folder`` until no more can be."""
    with suppress(OSError):
        for number in count():
            (folder / f"file-{number}").touch(exist_ok=False)
