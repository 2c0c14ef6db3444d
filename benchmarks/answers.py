"""Asks a guest's application over HTTP until it answers.

Not here: the application (app.py).
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from onecopy.errors import GuestFailed, NotReady

_T = TypeVar("_T")
#: Seconds after which a guest without an answer is a failure; in an emulated host all takes long.
TIMEOUT = 600.0


def free_port() -> int:
    """Return a free port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def answered(port: int, name: str, patience: float = 0.2) -> None:
    """Wait until the guest on ``port`` answers with ``name``; raise NotReady."""
    said = await until(lambda: _ask(port), name, patience)
    if said != name:
        raise GuestFailed(f"the guest {name} answered with the name {said!r}")


async def until(ask: Callable[[], Awaitable[_T]], name: str, patience: float = 0.2) -> _T:
    """Ask the guest ``name`` until it answers; raise NotReady.

    ``ask`` raises OSError or ValueError until the guest answers. ``patience`` are the seconds to
    wait for the first attempt's answer.
    """
    began = time.monotonic()
    # QEMU accepts the connection at once and holds it until the guest is up: retry, often at
    # first, seldom once it is clear that the guest is slow.
    while (past := time.monotonic() - began) < TIMEOUT:
        try:
            async with asyncio.timeout(patience):
                return await ask()
        except (TimeoutError, OSError, ValueError):
            patience = max(patience, min(patience * 1.03, max(2.0, past / 10)))
            await asyncio.sleep(0.01)
    raise NotReady(f"{name} did not answer within {TIMEOUT:g} s")


async def _ask(port: int) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    if b" 200 " not in head:
        raise ValueError(head)
    return str(json.loads(body)["name"])


async def before(end: Awaitable[object], wanted: Awaitable[_T]) -> _T:
    """Return the result of ``wanted``; raise GuestFailed or ``end``'s error if it ends first."""
    ended, task = asyncio.ensure_future(end), asyncio.ensure_future(wanted)
    try:
        await asyncio.wait({ended, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise GuestFailed(f"the guest ended before it was ready ({ended.result()})")
    finally:
        for each in (ended, task):
            each.cancel()
        await asyncio.gather(ended, task, return_exceptions=True)
