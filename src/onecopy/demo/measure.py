"""Starts guests, and measures the time until each application answers with its guest's name."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import msgspec

from onecopy.guest.lifecycle import start
from onecopy.guest.observe.accounts import report_of
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.linux import process

_REQUEST = b"GET / HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n"
#: Seconds for a guest to answer.
PATIENCE = 180.0


class Measured(msgspec.Struct, frozen=True):
    """The figures of guests that were started together; times in seconds, memory in bytes."""

    kind: str
    accel: str
    """``kvm`` or ``tcg``, and the reason."""
    guests: int
    answered: int
    """Number of guests that answered with their own name."""
    seconds: float
    """Time from the first start to the last answer."""
    each: tuple[float, ...]
    """Time from the first start to each guest's answer."""
    ram_private: int
    """Mean RAM that a guest does not share."""
    host: int
    """Mean host memory of a guest: page tables and Pss, which divides shared pages."""

    @property
    def per_guest(self) -> float:
        """Seconds until all applications answered, divided by the number of guests."""
        return self.seconds / self.guests


async def start_batch(host: Runtime, kind: str, request: start.Request, owner: Path) -> Measured:
    """Start guests that publish a port, and measure them when all have answered on it.

    The guests end with ``owner``.
    """
    answers: list[asyncio.Task[float | None]] = []

    def ask(record: GuestRecord) -> None:
        # The next guest starts while this one answers.
        answers.append(asyncio.create_task(_answered(record.name, record.publish[0][0])))

    group = start.plan(host, request)
    began = time.monotonic()
    started = await start.start(host, group, owner=owner, ran=ask)
    when = [at for at in await asyncio.gather(*answers) if at is not None]
    figures = report_of(started.guests)
    # A fork server maps pages of its guests, too, so it has a part of their Pss.
    servers = {process.parent(guest.pid) for guest in started.guests}
    every = [*figures.guests, *(each for each in figures.servers if each.pid in servers)]
    count, accel = len(started.guests), group.plans[0].accel
    return Measured(
        accel=f"{accel.name}: {accel.reason}",
        kind=kind,
        guests=count,
        answered=len(when),
        seconds=max(when, default=time.monotonic()) - began,
        each=tuple(at - began for at in when),
        ram_private=(figures.totals["ram_private"] or 0) // count,
        host=sum((each.pss_total or 0) + (each.page_tables or 0) for each in every) // count,
    )


async def _answered(name: str, port: int) -> float | None:
    """Return when the application on ``port`` answered with ``name``; None after the deadline."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        # A short limit, because a request sent before the application listens may get no answer.
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
