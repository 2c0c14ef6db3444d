"""What a guest's console and QEMU said, in files that cannot fill the host.

QEMU appends to ``console.log`` and ``qemu.log`` in the run folder. A file that is no disk may have
LOG_ROOM bytes (vmm_limits.py), and what goes over that is dropped. The limit is one on offsets, and
one for all files of a process: so `make_room` makes the logs as long as the old limit, sparsely,
raises that, and drops all but the newest of what they had. Not here: where they are shown
(cli/logs_cmd.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from onecopy.linux.sandbox import rlimits
from onecopy.linux.syscall import punch_hole
from onecopy.vmm.vmm_limits import LOG_ROOM, file_room, let_write

CONSOLE, QEMU = "console.log", "qemu.log"
#: Bytes of a log from which on room is made, and how many are kept then.
_FILLING, _KEPT = LOG_ROOM * 3 // 4, LOG_ROOM // 2
_CHUNK = 1 << 16
_BLOCK = 4096


def make(folder: Path) -> None:
    """Make the logs of a new run folder: QEMU can make nothing there."""
    for name in (CONSOLE, QEMU):
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))


def are_filling(folder: Path) -> bool:
    """Whether a log needs room, or has more than it may."""
    return any(_allocated(folder / name) > _FILLING for name in (CONSOLE, QEMU))


def make_room(folder: Path, pid: int, largest: int = 0) -> None:
    """Let the logs of VMM ``pid`` go on, and let it write to files of ``largest`` bytes.

    One command at a time does this (Host.locked). Raises OSError.
    """
    present = file_room(pid)
    if present == rlimits.UNLIMITED:
        return
    # No log is longer than the limit was.
    begin = -(-max(present, largest) // _BLOCK) * _BLOCK
    for name in (CONSOLE, QEMU):
        _go_on_at(folder / name, begin, full=present)
    let_write(pid, begin + LOG_ROOM)


def _go_on_at(path: Path, begin: int, *, full: int) -> None:
    fd = _open(path, os.O_RDWR)
    try:
        cut = os.fstat(fd).st_size == full
        os.ftruncate(fd, begin)
        if cut | _keep_newest(fd):
            _mark(path).touch(0o600)
    finally:
        os.close(fd)


def _keep_newest(fd: int) -> bool:
    """Drop all but the newest of a log; whether there was anything to drop."""
    kept = 0
    for start, stop in reversed(list(_extents(fd))):
        kept += stop - start
        if kept > _KEPT:
            punch_hole(fd, 0, start + kept - _KEPT)
            return True
    return False


class Log:
    """A log that is being read, from the oldest that is left."""

    def __init__(self, folder: Path, name: str) -> None:
        """Open it; raise OSError."""
        self._path = folder / name
        self._fd = _open(self._path, os.O_RDONLY)
        self._at = 0

    @property
    def was_cut(self) -> bool:
        """Whether some of what was said has been dropped."""
        return _mark(self._path).exists()

    @property
    def written(self) -> float:
        """When something was last written to it, in seconds since the epoch."""
        return os.fstat(self._fd).st_mtime

    def read(self) -> Iterator[bytes]:
        """What is new, in pieces; without the NULs that holes, and the ends of blocks, read as."""
        for start, stop in _extents(self._fd, self._at):
            while start < stop and (data := os.pread(self._fd, min(stop - start, _CHUNK), start)):
                start = self._at = start + len(data)
                yield data.replace(b"\0", b"")

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)


def read(folder: Path, name: str) -> str:
    """All that is left of a log; raise OSError."""
    log = Log(folder, name)
    try:
        return b"".join(log.read()).decode(errors="replace")
    finally:
        log.close()


class Tail(msgspec.Struct, frozen=True):
    """The newest that a log has."""

    data: bytes
    cut: bool
    """Whether there was something older."""
    written: float | None
    """When something was last written to it, in seconds since the epoch; None if never."""

    @property
    def text(self) -> str:
        """It, whatever its bytes are."""
        return self.data.decode(errors="replace")


def tail(folder: Path, name: str, most: int) -> Tail:
    """The last ``most`` bytes of a log; nothing of one that cannot be read."""
    with contextlib.suppress(OSError), contextlib.closing(Log(folder, name)) as log:
        data = b"".join(log.read())
        return Tail(data[-most:], log.was_cut or len(data) > most, log.written if data else None)
    return Tail(b"", False, None)


def write(folder: Path, name: str, said: Tail) -> None:
    """Keep what a log had in another folder. Raises OSError."""
    (folder / name).write_bytes(said.data)
    if said.cut:
        _mark(folder / name).touch(0o600)


def _extents(fd: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts of a file that are no holes."""
    end = os.fstat(fd).st_size
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
            stop = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        yield start, min(stop, end)
        start = stop


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)


def _allocated(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_blocks * 512
    return 0


def _mark(path: Path) -> Path:
    return path.with_suffix(".cut")
