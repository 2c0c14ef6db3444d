"""The logs of a guest's console and of QEMU in its run directory.

QEMU appends to ``console.log`` and ``qemu.log``. Each file of a VMM that is not a disk may have
LOG_ROOM bytes, so that the logs cannot fill the host's disk (vmm_limits.py). Not here: more room
for a full log (log_room.py), showing logs (cli/logs_cmd.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from onecopy.model import MIB

CONSOLE, QEMU = "console.log", "qemu.log"
#: Bytes of a log, and so of any file of a VMM that is not a disk.
LOG_ROOM = 4 * MIB
#: The size in bytes at which a log is trimmed (log_room.py).
_FILLING = LOG_ROOM * 3 // 4
_CHUNK = 1 << 16


def make(folder: Path) -> None:
    """Create the logs of a new run directory, where QEMU may not create files."""
    for name in (CONSOLE, QEMU):
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))


def are_filling(folder: Path) -> bool:
    """Whether a log needs more space or is too large."""
    return any(_allocated(folder / name) > _FILLING for name in (CONSOLE, QEMU))


class Log:
    """A log that is being read, from the oldest content that is left."""

    def __init__(self, folder: Path, name: str) -> None:
        """Open a log.

        Raises:
            OSError: it cannot be opened.
        """
        self._path = folder / name
        self._fd = open_log(self._path, os.O_RDONLY)
        self._at = 0

    @property
    def was_cut(self) -> bool:
        """Whether older content has been dropped."""
        return cut_mark(self._path).exists()

    @property
    def written(self) -> float:
        """The time of the last write, in seconds since the epoch."""
        return os.fstat(self._fd).st_mtime

    def read(self) -> Iterator[bytes]:
        """Yield new content in pieces, without the NULs of holes and of partial blocks."""
        for start, stop in extents(self._fd, self._at):
            while start < stop and (data := os.pread(self._fd, min(stop - start, _CHUNK), start)):
                start = self._at = start + len(data)
                yield data.replace(b"\0", b"")

    def close(self) -> None:
        """Close the log."""
        os.close(self._fd)


def read(folder: Path, name: str) -> str:
    """Read the content that is left in a log.

    Raises:
        OSError: it cannot be read.
    """
    log = Log(folder, name)
    try:
        return b"".join(log.read()).decode(errors="replace")
    finally:
        log.close()


class Tail(msgspec.Struct, frozen=True):
    """The newest content of a log."""

    data: bytes
    cut: bool
    """Whether there was older content."""
    written: float | None
    """The time of the last write, in seconds since the epoch; None if there was none."""

    @property
    def text(self) -> str:
        """The content as text; invalid UTF-8 is replaced."""
        return self.data.decode(errors="replace")


def tail(folder: Path, name: str, most: int) -> Tail:
    """Read the last ``most`` bytes of a log; an unreadable log counts as empty."""
    with contextlib.suppress(OSError), contextlib.closing(Log(folder, name)) as log:
        data = b"".join(log.read())
        return Tail(data[-most:], log.was_cut or len(data) > most, log.written if data else None)
    return Tail(b"", False, None)


def write(folder: Path, name: str, content: Tail) -> None:
    """Write the content of a log to another directory.

    Raises:
        OSError: it cannot be written.
    """
    (folder / name).write_bytes(content.data)
    if content.cut:
        cut_mark(folder / name).touch(0o600)


def extents(fd: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the parts of a file that are not holes."""
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


def open_log(path: Path, flags: int) -> int:
    """Open a log with these flags of open(2), but never through a symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)


def _allocated(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_blocks * 512
    return 0


def cut_mark(path: Path) -> Path:
    """Return the file whose existence says that older content of a log was dropped."""
    return path.with_suffix(".cut")
