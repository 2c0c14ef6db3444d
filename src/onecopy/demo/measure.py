"""Starts guests, and measures the time until each application answers with its guest's name."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from onecopy.guest.lifecycle.batch import start_many
from onecopy.guest.observe.accounts import guest_maps
from onecopy.guest.ports import Ports
from onecopy.guest.run_directory import Batch, GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.sharing import report

_REQUEST = b"GET / HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n"
#: Seconds for a guest to answer.
PATIENCE = 180.0


class Measured(msgspec.Struct, frozen=True):
    """The figures of guests that were started together; times in seconds, memory in bytes."""

    kind: str
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


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


async def start_batch(
    host: Runtime,
    kind: str,
    names: Sequence[str],
    start: Callable[[str, Ports, Batch], Awaitable[GuestRecord]],
) -> Measured:
    """Start guests together, and measure them when all have answered; the caller ends them."""
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    answers: dict[str, asyncio.Task[float | None]] = {}

    async def start_and_ask(name: str, batch: Batch) -> GuestRecord:
        record = await start(name, ((ports[name], 80),), batch)
        # The next guest starts while this one answers.
        answers[name] = asyncio.create_task(_answered(name, ports[name]))
        return record

    began = time.monotonic()
    started = await start_many(host, names, start_and_ask)
    when = [at for at in await asyncio.gather(*answers.values()) if at is not None]
    figures = report.collect(guest_maps(started.guests)).totals
    count = len(names)
    return Measured(
        kind=kind,
        guests=count,
        answered=len(when),
        seconds=max(when, default=time.monotonic()) - began,
        each=tuple(at - began for at in when),
        ram_private=(figures["ram_private"] or 0) // count,
        host=((figures["pss_total"] or 0) + (figures["page_tables"] or 0)) // count,
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
