"""The other end of a virtio port's pipes: QEMU has both FIFOs open, both ways, while it lives."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path


class Peer:
    """What QEMU and the guest behind it do with a pair of FIFOs that are there already."""

    def __init__(self, folder: Path, name: str) -> None:
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
        self._from = os.open(folder / f"{name}.in", flags)
        self._to = os.open(folder / f"{name}.out", flags)
        self._open = [self._from, self._to]
        self._held = b""

    def close(self) -> None:
        """As when QEMU ends."""
        while self._open:
            os.close(self._open.pop())

    async def line(self) -> bytes:
        """The next line that came, without its end."""
        while b"\n" not in self._held:
            try:
                self._held += os.read(self._from, 1 << 16)
            except BlockingIOError:
                await asyncio.sleep(0.001)
        line, _, self._held = self._held.partition(b"\n")
        return line

    async def send(self, data: bytes) -> None:
        """Write all of it, as the host makes room."""
        while data:
            try:
                data = data[os.write(self._to, data) :]
            except BlockingIOError:
                await asyncio.sleep(0.001)
