"""The sources and sinks of a program's streams.

A guest may print without end. Therefore a sink that captures output has a limit, and a sink that
passes output on can make the guest wait. Not here: moving the data (exec.py).
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
from collections.abc import Awaitable, Callable

import msgspec

from onecopy.errors import OutputFailed, TooLarge
from onecopy.model import MIB, format_size
from onecopy.vmm.port_pipe import writable

#: Default limits of captured output in bytes: of a program, and of a script of onecopy's.
KEPT, SAID = 64 * MIB, MIB
#: Bytes of an error output's end that are kept, and the limit of the whole error output.
_TAIL, _ALL = 64 << 10, 16 * MIB

Sink = Callable[[bytes], object]
"""Takes a chunk; if it returns an awaitable, the next chunk waits for that."""


class Streams(msgspec.Struct, frozen=True):
    """The streams of a program; ``stdin`` None means an empty input.

    An exception of a source or sink ends the program.
    """

    stdout: Sink
    stderr: Sink
    stdin: asyncio.StreamReader | bytes | None = None


class Kept(bytearray):
    """A sink that captures up to ``limit`` bytes, and raises TooLarge beyond."""

    def __init__(self, limit: int = KEPT) -> None:
        super().__init__()
        self._limit = limit

    def __call__(self, data: bytes) -> None:
        """Append a chunk."""
        if len(self) + len(data) > self._limit:
            raise _endless(self._limit)
        self.extend(data)


class Tail(bytearray):
    """A sink that keeps the last 64 KiB, and raises TooLarge beyond 16 MiB in all."""

    def __init__(self) -> None:
        super().__init__()
        self._all = 0

    def __call__(self, data: bytes) -> None:
        """Append a chunk."""
        self._all += len(data)
        if self._all > _ALL:
            raise _endless(_ALL)
        self.extend(data)
        del self[:-_TAIL]


def to_file(fd: int) -> Sink:
    """Return a sink that writes to a descriptor and makes the program wait for its reader.

    Other tasks and the program's time limit do not wait for the reader. The sink raises
    OutputFailed if the descriptor cannot be written.
    """
    poll, alone = select.poll(), asyncio.Lock()
    poll.register(fd, select.POLLOUT)

    async def write(data: bytes) -> None:
        async with alone:
            while data:
                # Other processes may share the descriptor, so it must stay blocking. A ready pipe
                # accepts PIPE_BUF bytes without blocking (pipe(7)). Files are always ready.
                if not poll.poll(0):
                    await writable(fd)
                data = data[_some(fd, data[: select.PIPE_BUF]) :]

    return write


def _some(fd: int, data: bytes) -> int:
    try:
        return os.write(fd, data)
    except BlockingIOError:
        return 0
    except OSError as error:
        raise OutputFailed(fd, error.errno or errno.EIO) from error


async def give(sink: Sink, data: bytes) -> None:
    """Pass a chunk to a sink, wait for it, and let other tasks run."""
    taken = sink(data)
    if isinstance(taken, Awaitable):
        await taken
    # Without this a steady stream would keep deadlines from firing.
    await asyncio.sleep(0)


def _endless(limit: int) -> TooLarge:
    return TooLarge(
        f"a program in the guest printed more than {format_size(limit)} and was ended",
        hint="use `onecopy exec`, or stdout= and stderr= in Python: both pass on any amount",
    )
