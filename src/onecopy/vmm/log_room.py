"""Make room in the logs of a running VMM, which may not fill the host's disk.

The kernel enforces the limit of LOG_ROOM bytes (logs.py) on file offsets, and it is the same for
all files of a process; output beyond it is lost. `make_room` extends the logs sparsely to the old
limit, raises the limit, and drops all but the newest content. Not here: reading logs (logs.py).
"""

from __future__ import annotations

import os
from pathlib import Path

from onecopy.linux.sandbox import rlimits
from onecopy.linux.syscall import punch_hole
from onecopy.vmm.logs import CONSOLE, LOG_ROOM, QEMU, cut_mark, extents, open_log
from onecopy.vmm.vmm_limits import file_room, let_write

#: Bytes of a log that remain when it is trimmed.
_TRIMMED = LOG_ROOM // 2
_BLOCK = 4096


def make_room(folder: Path, pid: int, largest: int = 0) -> None:
    """Let the logs of a VMM continue, and allow the VMM files of ``largest`` bytes.

    Only one command at a time may do this (Host.locked).

    Raises:
        OSError: a log or a limit cannot be changed.
    """
    present = file_room(pid)
    if present == rlimits.UNLIMITED:
        return
    # No log is longer than the old limit.
    begin = -(-max(present, largest) // _BLOCK) * _BLOCK
    for name in (CONSOLE, QEMU):
        _extend(folder / name, begin, full=present)
    let_write(pid, begin + LOG_ROOM)


def _extend(path: Path, begin: int, *, full: int) -> None:
    fd = open_log(path, os.O_RDWR)
    try:
        cut = os.fstat(fd).st_size == full
        os.ftruncate(fd, begin)
        if cut | _keep_newest(fd):
            cut_mark(path).touch(0o600)
    finally:
        os.close(fd)


def _keep_newest(fd: int) -> bool:
    """Drop all but the newest content of a log; return whether anything was dropped."""
    size = 0
    for start, stop in reversed(list(extents(fd))):
        size += stop - start
        if size > _TRIMMED:
            punch_hole(fd, 0, start + size - _TRIMMED)
            return True
    return False
