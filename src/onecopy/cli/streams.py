"""Standard input, output and error, which may be closed, full or without a reader.

If output cannot be written, the command ends with `OutputFailed`. If a message cannot be written,
the command goes on. Not here: formatting the output (output.py).
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from onecopy.errors import HostFailed, OutputFailed

if TYPE_CHECKING:
    from typing_extensions import Buffer


def secure() -> None:
    """Open the closed descriptors among 0 to 2, and guard Python's streams on them.

    Call this before any other file is opened. Such a file would get the free number, and receive
    the output.
    """
    for fd, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            # Opened for the opposite direction, as by gnulib's stdopen(): reading or writing fails
            # instead of losing data silently.
            os.open(os.devnull, mode)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - open until the process ends
    # Streams that a test has replaced stay unchanged.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _guarded(_Output(1, "w", closefd=False))
    if sys.stderr is sys.__stderr__:
        sys.stderr = _guarded(_Messages(2, "w", closefd=False))


def put(fd: int, data: Buffer) -> int:
    """Write a part of ``data`` and return its length in bytes; block while the stream is full.

    Raises:
        OutputFailed: The stream cannot be written.
    """
    while True:
        try:
            return os.write(fd, data)
        except BlockingIOError:
            select.select([], [fd], [])
        except OSError as error:
            raise OutputFailed(fd, error.errno or errno.EIO) from error


def put_all(fd: int, data: bytes) -> None:
    """Write all of ``data``; raise OutputFailed."""
    view = memoryview(data)
    while view:
        view = view[put(fd, view) :]


def take(size: int) -> bytes:
    """Read up to ``size`` bytes of standard input, empty at its end; raise HostFailed."""
    while True:
        try:
            return os.read(0, size)
        except BlockingIOError:
            select.select([0], [], [])
        except OSError as error:
            said = "it is closed" if error.errno == errno.EBADF else error.strerror
            raise HostFailed(
                f"standard input cannot be read: {said}",
                hint="redirect standard input, for example from /dev/null",
            ) from error


def finish() -> None:
    """Write the buffered standard output; raise OutputFailed."""
    sys.stdout.flush()


def give_up() -> None:
    """Discard unwritten output, so that Python does not try to write it at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    with suppress(OSError, ValueError):
        sys.stdout.flush()


class _Output(io.FileIO):
    def write(self, data: Buffer, /) -> int:
        return put(self.fileno(), data)


class _Messages(io.FileIO):
    def write(self, data: Buffer, /) -> int:
        try:
            return put(self.fileno(), data)
        except OutputFailed:
            # There is no other stream to report the failure on.
            return memoryview(data).nbytes


def _guarded(raw: io.FileIO) -> io.TextIOWrapper:
    before = sys.__stderr__ if raw.fileno() == 2 else sys.__stdout__
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before else "utf-8",
        # Names of files may be invalid text, and messages must show them.
        errors="backslashreplace",
        line_buffering=raw.isatty() or raw.fileno() == 2,
    )
