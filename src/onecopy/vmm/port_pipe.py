"""The two FIFOs of a virtio port of the guest, as one side of a line protocol."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from pathlib import Path

from onecopy.errors import AgentFailed, GuestFailed

_CHUNK = 1 << 16
#: Bytes that a FIFO can hold (pipe(7)), by far.
_FIFO = 1 << 21


class Pipe:
    """Both directions, opened so that neither waits for the other side.

    QEMU has both FIFOs open, both ways, from its start to its end: that tells whether it lives, and
    keeps what is in them. All that waits raises GuestFailed when QEMU has ended, and lets other
    tasks run between two pieces of what comes, however fast it comes.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Open them; raise GuestFailed if QEMU has them not open, or OSError."""
        flags = os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._to = os.open(folder / f"{name}.in", os.O_WRONLY | flags)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nobody has it open to read (fifo(7))
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
        """Write all of ``data``, waiting for the guest to take it."""
        while data:
            try:
                data = data[os.write(self._to, data) :]
            except BlockingIOError:
                await writable(self._to)
            except BrokenPipeError:
                raise _ended() from None

    def drain(self) -> None:
        """Drop what has come so far."""
        self._buffer.clear()
        with contextlib.suppress(BlockingIOError):
            # A guest that floods it has more at any time.
            for _ in range(_FIFO // _CHUNK):
                if not os.read(self._from, _CHUNK):
                    return

    async def some(self, limit: int) -> bytes:
        """What has come, at most ``limit`` bytes, once something has."""
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
        """What comes up to ``end``, one byte, without it; raise AgentFailed beyond ``limit`` bytes.

        What has come by then is kept, also if the caller waits no longer.
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
        """Drop all that comes up to ``end``, one byte, and that."""
        while (at := self._buffer.find(end)) < 0:
            self._buffer.clear()
            self._buffer += await self.some(_CHUNK)
        del self._buffer[: at + 1]


def _ended() -> GuestFailed:
    return GuestFailed("the guest has ended", hint="`onecopy ps` lists those that run")


async def writable(fd: int) -> None:
    """Wait until a descriptor takes something, or nobody has its other end any more."""
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
