"""Runs the programs that make images, confined to the tree they read and the image they write.

These programs have memory errors (mke2fs 1.47.0 writes past its heap), and a source tree may be
malicious. Not here: the confinement itself (vmm/confined_tool.py).
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
from onecopy.vmm.confined_tool import READ_ANY, READ_TREE, Limits, Task, ToolResult, named, run_tool
from onecopy.vmm.passed_files import READ, WRITE

#: CAP_SYS_ADMIN, which reading attributes named trusted.* requires.
_SEE_TRUSTED = 1 << 21
#: Time limit in seconds: a constant, and more for each MiB and each thousand files.
_SECONDS, _SECONDS_EACH = 1800, 1
#: Memory limit in bytes: a constant, and more for each file and each MiB. mkfs.erofs 1.5 keeps a
#: path of 4 KiB for each file.
_MEMORY, _MEMORY_PER_FILE, _MEMORY_PER_MIB = 1 << 30, 5000, 1024


def run_maker(
    argv: Sequence[str],
    facts: Facts,
    image: int,
    tree: int | None = None,
    *,
    behind: Sequence[str] = (),
    over: Mapping[int, Path] | None = None,
) -> ToolResult:
    """Run a confined program that writes an image.

    Args:
        argv: The command line; the name of ``image`` and ``behind`` are appended.
        facts: The result of `scan`, which sets the limits.
        image: Descriptor of the file to write.
        tree: Descriptor of the directory to read.
        behind: Arguments after the image's name.
        over: As in `Task`.

    Raises:
        CommandFailed: The program failed or exceeded a limit.
        MissingProgram, Incompatible: It is not installed, or cannot be confined.
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
                    seconds=_SECONDS + _SECONDS_EACH * (mib + facts.inodes // 1000),
                    memory=_MEMORY + _MEMORY_PER_FILE * facts.inodes + _MEMORY_PER_MIB * mib,
                    # The kernel counts threads as processes.
                    processes=16,
                    file_size=2 * facts.blocks * PAGE_SIZE + (8 << 30),
                ),
            )
        )
    finally:
        os.close(proc)


def _environment(facts: Facts) -> Mapping[str, str]:
    """Return the variables that make images independent of the time and the host."""
    return {
        "MKE2FS_CONFIG": "/dev/null",
        # e2fsprogs takes 0 as unset and reads the clock.
        "E2FSPROGS_FAKE_TIME": str(max(1, facts.newest)),
        "SOURCE_DATE_EPOCH": str(facts.newest),
    }


def require_memory(facts: Facts) -> None:
    """Raise InsufficientResources if mkfs.erofs needs more memory than this host has available."""
    needed, available = _MEMORY_PER_FILE * facts.inodes, meminfo.read().available
    if available is not None and needed > available:
        raise InsufficientResources(
            "memory",
            needed=needed,
            available=available,
            hint=f"mkfs.erofs keeps {facts.inodes:,} files in memory: use --fs ext2",
        )


@contextmanager
def make_file(path: Path, size: int = 0) -> Iterator[int]:
    """Create a file of ``size`` zero bytes, and yield its descriptor for reading and writing."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o644)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)
