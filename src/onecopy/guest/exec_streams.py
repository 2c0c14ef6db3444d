"""Where the streams of a program in a guest come from, and what keeps them.

A guest may print without end. So what is kept has a limit, and what takes it away in pieces may let
the guest wait. Not here: how they come and go (exec.py).
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

#: Bytes of a program's output that are kept unless more is asked for, and of what a script of ours
#: has to say in a guest.
KEPT, SAID = 64 * MIB, MIB
#: Bytes of the end of an error output that are kept, and those that it may have in all.
_TAIL, _ALL = 64 << 10, 16 * MIB

Sink = Callable[[bytes], object]
"""Takes a piece; if it returns an awaitable the program's next piece waits for that."""


class Streams(msgspec.Struct, frozen=True):
    """Where a program's streams go; ``stdin`` None means an empty one.

    What reading one or writing the others raises ends the program.
    """

    stdout: Sink
    stderr: Sink
    stdin: asyncio.StreamReader | bytes | None = None


class Kept(bytearray):
    """A sink that keeps all, up to ``limit`` bytes; raises TooLarge beyond."""

    def __init__(self, limit: int = KEPT) -> None:
        super().__init__()
        self._limit = limit

    def __call__(self, data: bytes) -> None:
        """Take a piece."""
        if len(self) + len(data) > self._limit:
            raise _endless(self._limit)
        self.extend(data)


class Tail(bytearray):
    """A sink that keeps the end of what it is given; raises TooLarge when that is far too much."""

    def __init__(self) -> None:
        super().__init__()
        self._all = 0

    def __call__(self, data: bytes) -> None:
        """Take a piece."""
        self._all += len(data)
        if self._all > _ALL:
            raise _endless(_ALL)
        self.extend(data)
        del self[:-_TAIL]


def to_file(fd: int) -> Sink:
    """A sink that writes to a descriptor, and lets the program wait for who reads it.

    Nothing else waits for them: neither other tasks, nor the end of the program's time. It raises
    OutputFailed when nobody takes what is written.
    """
    poll, alone = select.poll(), asyncio.Lock()
    poll.register(fd, select.POLLOUT)

    async def write(data: bytes) -> None:
        async with alone:
            while data:
                # A descriptor that others have, too, must go on to block. What is ready takes at
                # least so much (pipe(7)); files, which event loops do not take, always are.
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
    """Pass a piece on, waiting for who takes it; other tasks have run by then."""
    taken = sink(data)
    if isinstance(taken, Awaitable):
        await taken
    # What comes all the time would keep deadlines from being seen.
    await asyncio.sleep(0)


def _endless(limit: int) -> TooLarge:
    return TooLarge(
        f"a program in the guest printed more than {format_size(limit)}, and was ended",
        hint="`onecopy exec`, and in Python stdout= and stderr=, pass on any amount in pieces",
    )
