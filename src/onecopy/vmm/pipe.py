"""The two FIFOs of a virtio port of the guest, as one side of a line protocol."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path


class Pipe:
    """Both directions, opened so that neither waits for nor loses the other side."""

    def __init__(self, folder: Path, name: str) -> None:
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
        self._to = os.open(folder / f"{name}.in", flags)
        self._from = os.open(folder / f"{name}.out", flags)
        self._buffer = b""

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
                await _ready(self._to, write=True)

    def drain(self) -> None:
        """Drop what has come so far."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._from, 1 << 16):
                pass

    async def some(self, limit: int) -> bytes:
        """What has come, at most ``limit`` bytes, once something has."""
        while True:
            try:
                return os.read(self._from, limit)
            except BlockingIOError:
                await _ready(self._from)

    async def until(self, end: bytes) -> bytes:
        """What comes up to ``end``, without it."""
        while end not in self._buffer:
            try:
                self._buffer += os.read(self._from, 1 << 20)
            except BlockingIOError:
                await _ready(self._from)
        line, _, self._buffer = self._buffer.partition(end)
        return line


async def _ready(fd: int, *, write: bool = False) -> None:
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    add, remove = (
        (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    )
    add(fd, event.set)
    try:
        await event.wait()
    finally:
        remove(fd)
