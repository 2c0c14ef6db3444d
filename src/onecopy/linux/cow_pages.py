"""What a process has written to a file that it maps private: read it, or undo it.

The pages are found by /proc/PID/pagemap and moved through /proc/PID/mem, which takes the rights to
trace the process (ptrace(2), PTRACE_MODE_ATTACH). The process should be stopped, or not use them.
Not here: what they are for (guest/segments/commit.py, guest/segments/reset.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from onecopy.errors import NotFound, NotPermitted
from onecopy.linux.counters import pagemap, smaps
from onecopy.linux.files import ROOT, asking, no_process, process_folder, write_at
from onecopy.model import PAGE_SIZE

_CHUNK = 4 << 20


class Run(msgspec.Struct, frozen=True):
    """Pages side by side that are the process's own; all in bytes."""

    address: int
    offset: int
    """In the file."""
    size: int


def own_runs(pid: int, path: str, root: Path = ROOT) -> list[Run]:
    """Where a process has written to its private mappings of the file ``path``.

    Raises NotFound (no such process, or it does not map it), NotPermitted.
    """
    mappings = [m for m in smaps.read(pid, root) if m.path == path and m.perms[3] == "p"]
    if not mappings:
        raise NotFound(f"process {pid} does not map {path}", hint="`onecopy ps` lists the guests")
    return [
        run
        for m in mappings
        for run in own_runs_at(pid, m.start, m.size, offset=m.offset, root=root)
    ]


def own_runs_at(
    pid: int, start: int, size: int, *, offset: int = 0, root: Path = ROOT
) -> Iterator[Run]:
    """The pages of a process's own in ``size`` bytes from address ``start`` on.

    ``offset`` is where ``start`` belongs in the file. Raises NotFound, NotPermitted.
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
    """Whether a page is a copy of the process's own, in memory or in swap."""
    here = pagemap.present(entry) or pagemap.swapped(entry)
    return here and not pagemap.file_or_shared(entry)


def copy_out(pid: int, runs: list[Run], out: int) -> None:
    """Write what stands in ``runs`` to the file ``out``, at the same offsets.

    Raises NotFound when the process ends meanwhile, NotPermitted, Unreadable; OSError of ``out``.
    """
    with _memory(pid, os.O_RDONLY) as memory:
        for run in runs:
            for at in range(0, run.size, _CHUNK):
                size = min(_CHUNK, run.size - at)
                with asking(pid, _path(pid)):
                    data = os.pread(memory, size, run.address + at)
                if len(data) < size:
                    raise no_process(pid)
                write_at(out, data, run.offset + at)


def put_back(pid: int, runs: list[Run], content: int) -> None:
    """Let ``runs`` hold again what the file ``content`` has there. Raises as ``copy_out``."""
    with _memory(pid, os.O_RDWR) as memory:
        for run in runs:
            for at in range(0, run.size, _CHUNK):
                data = os.pread(content, min(_CHUNK, run.size - at), run.offset + at)
                with asking(pid, _path(pid)):
                    write_at(memory, data, run.address + at)


@contextmanager
def _memory(pid: int, flags: int) -> Iterator[int]:
    try:
        with asking(pid, _path(pid)):
            fd = os.open(_path(pid), flags | os.O_CLOEXEC)
    except NotPermitted as error:
        raise NotPermitted(
            f"may not look into the memory of QEMU (process {pid})",
            hint="become root; or root allows it: sysctl kernel.yama.ptrace_scope=0",
        ) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _path(pid: int) -> Path:
    return process_folder(pid) / "mem"
