"""Programs that make images: each confined to the tree that it reads and the image that it writes.

Their faults are known (mke2fs 1.47.0 writes past its heap), and a tree is anybody's. Not here: how
they are confined (vmm/confined_tool.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from onecopy.errors import InsufficientResources
from onecopy.images.tree import Facts
from onecopy.linux.counters import meminfo
from onecopy.linux.process import capabilities
from onecopy.model import PAGE_SIZE
from onecopy.vmm.confined_tool import READ_ANY, READ_TREE, Limits, Ran, Task, named, run_tool
from onecopy.vmm.passed_files import READ, WRITE

#: CAP_SYS_ADMIN: see attributes named trusted.*.
_SEE_TRUSTED = 1 << 21
#: Seconds that making an image takes at most, and so many for each MiB and each thousand files.
_PATIENCE, _EACH = 1800, 1
#: Bytes of memory that it takes at most, and for each file (mkfs.erofs 1.5 keeps a path of 4 KiB
#: of each) and each MiB.
_MEMORY, _FOR_FILE, _FOR_MIB = 1 << 30, 5000, 1024


def run_maker(
    argv: Sequence[str],
    facts: Facts,
    image: int,
    tree: int | None = None,
    *,
    behind: Sequence[str] = (),
    over: Mapping[int, Path] | None = None,
) -> Ran:
    """Run a program that writes the open file ``image``, its last argument but for ``behind``.

    It reads below the open folder ``tree``, whose `Facts` bound what it may take; ``over`` is a
    task's (vmm/confined_tool.py). Raises
    CommandFailed, MissingProgram, Incompatible.
    """
    mib = facts.blocks * PAGE_SIZE >> 20
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    rights = {image: WRITE, proc: READ}
    if tree is not None:
        rights[tree] = READ_TREE
    wanted = READ_ANY | (_SEE_TRUSTED if facts.trusted else 0)
    try:
        return run_tool(
            Task(
                [*argv, named(image), *behind],
                rights,
                over=over or {},
                capabilities=wanted & capabilities() if tree is not None else 0,
                environment=_environment(facts),
                limits=Limits(
                    seconds=_PATIENCE + _EACH * (mib + facts.inodes // 1000),
                    memory=_MEMORY + _FOR_FILE * facts.inodes + _FOR_MIB * mib,
                    # Threads, that is.
                    processes=16,
                    file_size=2 * facts.blocks * PAGE_SIZE + (8 << 30),
                ),
            )
        )
    finally:
        os.close(proc)


def _environment(facts: Facts) -> Mapping[str, str]:
    """What makes images the same whenever they are made."""
    return {
        "MKE2FS_CONFIG": "/dev/null",
        # To e2fsprogs 0 is no time: it would look at the clock.
        "E2FSPROGS_FAKE_TIME": str(max(1, facts.newest)),
        "SOURCE_DATE_EPOCH": str(facts.newest),
    }


def require_memory(facts: Facts) -> None:
    """Raise InsufficientResources if mkfs.erofs needs more memory for its files than is there."""
    needed, available = _FOR_FILE * facts.inodes, meminfo.read().available
    if available is not None and needed > available:
        raise InsufficientResources(
            "memory",
            needed=needed,
            available=available,
            hint=f"mkfs.erofs keeps something of each of {facts.inodes:,} files: use --fs ext2",
        )


@contextmanager
def make_file(path: Path, size: int = 0) -> Iterator[int]:
    """An empty file of that size, open for reading and writing."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o644)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)
