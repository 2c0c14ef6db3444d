"""The two FIFOs of a guest's virtio port, as one end of a line protocol."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from pathlib import Path

from onecopy.errors import AgentFailed, GuestFailed

_CHUNK = 1 << 16
#: Bytes, more than any FIFO can hold (pipe(7)).
_FIFO = 1 << 21


class Pipe:
    """Both directions of a port, opened without waiting for the other end.

    QEMU keeps both FIFOs open, for reading and writing, from its start to its end. So they show
    whether QEMU runs, and keep their content. Each wait raises GuestFailed when QEMU has ended, and
    lets other tasks run between pieces of data, however fast these arrive.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Open both FIFOs.

        Raises:
            GuestFailed: QEMU has ended.
            OSError: they cannot be opened.
        """
        flags = os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._to = os.open(folder / f"{name}.in", os.O_WRONLY | flags)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no process has it open for reading (fifo(7))
                raise _ended() from None
            raise
        try:
            self._from = os.open(folder / f"{name}.out", os.O_RDONLY | flags)
        except BaseException:
            os.close(self._to)
            raise
        self._buffer = bytearray()

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._to)
        os.close(self._from)

    async def write(self, data: bytes) -> None:
        """Write all of ``data``, waiting for the guest to accept it."""
        while data:
            try:
                data = data[os.write(self._to, data) :]
            except BlockingIOError:
                await writable(self._to)
            except BrokenPipeError:
                raise _ended() from None

    def drain(self) -> None:
        """Discard all data that has arrived."""
        self._buffer.clear()
        with contextlib.suppress(BlockingIOError):
            # The loop is bounded, because a flooding guest always has more.
            for _ in range(_FIFO // _CHUNK):
                if not os.read(self._from, _CHUNK):
                    return

    async def some(self, limit: int) -> bytes:
        """Wait for data; return at most ``limit`` bytes."""
        while True:
            try:
                data = os.read(self._from, limit)
            except BlockingIOError:
                await _readable(self._from)
                continue
            if not data:
                raise _ended()
            await asyncio.sleep(0)
            return data

    async def until(self, end: bytes, limit: int) -> bytes:
        """Read up to the byte ``end``, and return the data before it.

        Data that has arrived is kept if the caller is cancelled.

        Raises:
            AgentFailed: more than ``limit`` bytes arrive before ``end``.
        """
        searched = 0
        while (at := self._buffer.find(end, searched)) < 0 and len(self._buffer) <= limit:
            searched = len(self._buffer)
            self._buffer += await self.some(_CHUNK)
        if not 0 <= at <= limit:
            raise AgentFailed(f"the guest sent a line of more than {limit} bytes")
        line = bytes(self._buffer[:at])
        del self._buffer[: at + 1]
        return line

    async def skip(self, end: bytes) -> None:
        """Discard all data up to and including the byte ``end``."""
        while (at := self._buffer.find(end)) < 0:
            self._buffer.clear()
            self._buffer += await self.some(_CHUNK)
        del self._buffer[: at + 1]


def _ended() -> GuestFailed:
    return GuestFailed("the guest has ended", hint="`onecopy ps` lists the running guests")


async def writable(fd: int) -> None:
    """Wait until a descriptor accepts data or its other end is closed."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    loop.add_writer(fd, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_writer(fd)


async def _readable(fd: int) -> None:
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(fd)
