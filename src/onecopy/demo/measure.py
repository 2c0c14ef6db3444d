"""Starting guests and timing each until its application answers a request with its own name."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import msgspec

from onecopy.guest.lifecycle import start
from onecopy.guest.observe.accounts import guest_maps
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.sharing import report

_REQUEST = b"GET / HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n"
#: Seconds that a guest has to answer.
PATIENCE = 180.0


class Measured(msgspec.Struct, frozen=True):
    """Guests that were started together, and what they took; times in seconds, memory in bytes."""

    kind: str
    accel: str
    """``kvm`` or ``tcg``, and why."""
    guests: int
    answered: int
    """How many answered with their own name."""
    seconds: float
    """From the first start until the last answer."""
    each: tuple[float, ...]
    """From the first start until each guest's answer."""
    ram_private: int
    """Pages of RAM that a guest has alone, mean."""
    host: int
    """Host memory per guest: Pss (what several share is divided among them) and page tables."""

    @property
    def per_guest(self) -> float:
        """Seconds until all applications answer, divided by the number of guests."""
        return self.seconds / self.guests


async def start_batch(host: Runtime, kind: str, request: start.Request, owner: Path) -> Measured:
    """Start guests that publish a port, and look at them when all have answered on it.

    They end with ``owner``.
    """
    answers: list[asyncio.Task[float | None]] = []

    def ask(record: GuestRecord) -> None:
        # The next guest starts while this one answers.
        answers.append(asyncio.create_task(_answered(record.name, record.publish[0][0])))

    group = start.plan(host, request)
    began = time.monotonic()
    started = await start.start(host, group, owner=owner, ran=ask)
    when = [at for at in await asyncio.gather(*answers) if at is not None]
    figures = report.collect(guest_maps(started.guests)).totals
    count, accel = len(started.guests), group.plans[0].accel
    return Measured(
        accel=f"{accel.name}: {accel.reason}",
        kind=kind,
        guests=count,
        answered=len(when),
        seconds=max(when, default=time.monotonic()) - began,
        each=tuple(at - began for at in when),
        ram_private=(figures["ram_private"] or 0) // count,
        host=((figures["pss_total"] or 0) + (figures["page_tables"] or 0)) // count,
    )


async def _answered(name: str, port: int) -> float | None:
    """When the application behind ``port`` answered with ``name``; None if it never does."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        # Short: what is sent before the application listens is answered late or never.
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                if await _request(port) == name:
                    return time.monotonic()
        await asyncio.sleep(0.02)
    return None


async def _request(port: int) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(_REQUEST)
        reply = await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return reply.partition(b"\r\n\r\n")[2].decode().strip()
