"""Copy or revert what a process has written to its private mappings of a file.

/proc/PID/pagemap locates the pages, /proc/PID/mem reads and writes them. Both need the right to
trace the process (ptrace(2), PTRACE_MODE_ATTACH). The process should be stopped or leave the pages
alone.

Not here: the uses (guest/segments/commit.py, guest/segments/reset.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from onecopy.errors import NotFound, NotPermitted
from onecopy.linux.counters import pagemap, smaps
from onecopy.linux.files import ROOT, no_process, process_directory, translating_errors, write_at
from onecopy.model import PAGE_SIZE

_CHUNK = 4 << 20


class Run(msgspec.Struct, frozen=True):
    """A run of adjacent pages that the process has written to; all in bytes."""

    address: int
    offset: int
    """The offset in the file."""
    size: int


def own_runs(pid: int, path: str, root: Path = ROOT) -> list[Run]:
    """List the pages that a process has written to in its private mappings of a file.

    Raises:
        NotFound: the process has ended or does not map the file.
        NotPermitted: this user may not trace the process.
    """
    mappings = [m for m in smaps.read(pid, root) if m.path == path and m.perms[3] == "p"]
    if not mappings:
        raise NotFound(
            f"process {pid} has no private mapping of {path}", hint="`onecopy ps` lists the guests"
        )
    return [
        run
        for m in mappings
        for run in own_runs_at(pid, m.start, m.size, offset=m.offset, root=root)
    ]


def own_runs_at(
    pid: int, start: int, size: int, *, offset: int = 0, root: Path = ROOT
) -> Iterator[Run]:
    """Yield the pages that a process has written to, in ``size`` bytes from address ``start``.

    Args:
        offset: the offset in the file that corresponds to ``start``.

    Raises:
        NotFound: the process has ended.
        NotPermitted: this user may not trace the process.
    """
    first = None
    entries = pagemap.read(pid, start, size // PAGE_SIZE, root)
    for number, entry in enumerate([*entries, 0]):
        if is_own(entry) and first is None:
            first = number
        elif not is_own(entry) and first is not None:
            at = first * PAGE_SIZE
            yield Run(start + at, offset + at, (number - first) * PAGE_SIZE)
            first = None


def is_own(entry: int) -> bool:
    """Whether a page is the process's own copy, in memory or in swap."""
    here = pagemap.present(entry) or pagemap.swapped(entry)
    return here and not pagemap.file_or_shared(entry)


def copy_out(pid: int, runs: list[Run], out: int) -> None:
    """Copy the content of ``runs`` to the file ``out``, at the same offsets.

    Raises:
        NotFound: the process has ended.
        NotPermitted: this user may not trace the process.
        Unreadable: the kernel refused to read the pages.
        OSError: the file cannot be written.
    """
    with _memory(pid, os.O_RDONLY) as memory:
        for run in runs:
            for at in range(0, run.size, _CHUNK):
                size = min(_CHUNK, run.size - at)
                with translating_errors(pid, _path(pid)):
                    data = os.pread(memory, size, run.address + at)
                if len(data) < size:
                    raise no_process(pid)
                write_at(out, data, run.offset + at)


def revert(pid: int, runs: list[Run], content: int) -> None:
    """Overwrite ``runs`` with the file ``content`` at the same offsets; raise like `copy_out`."""
    with _memory(pid, os.O_RDWR) as memory:
        for run in runs:
            for at in range(0, run.size, _CHUNK):
                data = os.pread(content, min(_CHUNK, run.size - at), run.offset + at)
                with translating_errors(pid, _path(pid)):
                    write_at(memory, data, run.address + at)


@contextmanager
def _memory(pid: int, flags: int) -> Iterator[int]:
    try:
        with translating_errors(pid, _path(pid)):
            fd = os.open(_path(pid), flags | os.O_CLOEXEC)
    except NotPermitted as error:
        raise NotPermitted(
            f"cannot access the memory of QEMU (process {pid}): permission denied",
            hint="run the command as root, or have root set: sysctl kernel.yama.ptrace_scope=0",
        ) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _path(pid: int) -> Path:
    return process_directory(pid) / "mem"
