"""Serves the guests' requests for segments: `onecopy serve`.

Each guest has a task, which serves one request at a time. A guest that floods its port only delays
itself. A guest that does not read its answers loses them. Slow work runs in threads. A guest whose
QEMU does not answer is not served for a while. Not here: handling a request (handlers.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from onecopy.errors import AlreadyExists, GuestFailed, NotFound, OnecopyError
from onecopy.guest.run_directory import RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.guest.segments import protocol
from onecopy.guest.segments.handlers import answer
from onecopy.guest.segments.protocol import Lines, MalformedRequest, Request
from onecopy.linux.lock import flock
from onecopy.vmm.port_pipe import Pipe

#: Seconds between two searches for new guests.
_LOOK = 0.25
#: The rate limit of a guest: requests in a burst, and seconds between requests after it.
_BURST, _PAUSE = 20, 0.2
#: Requests of all guests that are handled at the same time.
_AT_ONCE = 4
#: Seconds to handle a request; to ignore a guest whose request took longer; and for a guest to
#: read a line of its answer.
_TIMEOUT, _REST, _READING = 60.0, 60.0, 2.0
#: Seconds between two answers to malformed requests.
_MALFORMED = 5.0
_CHUNK = 4096

Tell = Callable[[str], None]


async def serve(host: Runtime, tell: Tell = lambda _: None) -> None:
    """Serve all guests of a store, later ones included, until cancelled.

    Args:
        host: The store's runtime.
        tell: Called with one line of text for each request.

    Raises:
        AlreadyExists: Another process serves the store.
    """
    with _alone(host), ThreadPoolExecutor(_AT_ONCE) as workers:
        tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        try:
            _follow(host, tasks, workers, tell, late=True)
            while True:
                await asyncio.sleep(_LOOK)
                _follow(host, tasks, workers, tell)
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)


def _follow(
    host: Runtime,
    tasks: dict[tuple[str, int], asyncio.Task[None]],
    workers: ThreadPoolExecutor,
    tell: Tell,
    *,
    late: bool = False,
) -> None:
    """Start a task for each new run directory, and cancel those of removed ones."""
    folders = dict(_folders(host.run))
    for key in tasks.keys() - folders.keys():
        tasks.pop(key).cancel()
    for key in folders.keys() - tasks.keys():
        tasks[key] = asyncio.create_task(_guest(host, folders[key], workers, tell, late=late))


def _folders(run: Path) -> Iterator[tuple[tuple[str, int], Path]]:
    """Yield (key, path) of the run directories; the key differs for a later guest of the name."""
    for path in run.iterdir():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            yield (path.name, (path / "segment.out").stat().st_ino), path


@contextlib.contextmanager
def _alone(host: Runtime) -> Iterator[None]:
    fd = os.open(host.run / ".serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not flock(fd, wait=False):
            raise AlreadyExists(
                "another `onecopy serve` is running for this store",
                hint="use that one, or end it first",
            )
        yield
    finally:
        os.close(fd)


async def _guest(
    host: Runtime, folder: Path, workers: ThreadPoolExecutor, tell: Tell, *, late: bool
) -> None:
    """Serve a guest."""
    lines, turns, rejected = Lines(), _Turns(), float("-inf")
    with contextlib.suppress(OSError, OnecopyError):
        await _wait_until_ready(folder)
        with Pipe(folder, "segment") as pipe:
            if late:
                # Requests from before this service started have timed out.
                pipe.drain()
            while True:
                await turns.next()
                for found in lines.feed(await pipe.some(_CHUNK)):
                    if isinstance(found, Request):
                        await turns.next()
                    elif time.monotonic() - rejected < _MALFORMED:
                        continue
                    else:
                        rejected = time.monotonic()
                    await _send(pipe, await _reply(host, folder.name, found, workers, tell))


async def _wait_until_ready(folder: Path) -> None:
    """Wait until a guest that is being started is ready, so that it can load segments."""
    while True:
        try:
            RunDirectory(folder).record()
        except NotFound:
            await asyncio.sleep(_LOOK)
        else:
            return


async def _send(pipe: Pipe, reply: bytes) -> None:
    """Send an answer, or its first lines if the guest does not read.

    A pipe accepts a line as a whole or not at all (pipe(7), PIPE_BUF).
    """
    with contextlib.suppress(TimeoutError):
        for line in reply.splitlines(keepends=True):
            async with asyncio.timeout(_READING):
                await pipe.write(line)


async def _reply(
    host: Runtime,
    guest: str,
    found: Request | MalformedRequest,
    workers: ThreadPoolExecutor,
    tell: Tell,
) -> bytes:
    if isinstance(found, MalformedRequest):
        tell(f"{guest}: {found.why}")
        return protocol.error(found.id, "bad-request", 2, found.why)
    loop = asyncio.get_running_loop()
    # A thread, because copying memory or a hanging VMM must not delay other guests.
    try:
        reply = await loop.run_in_executor(workers, _work, host, guest, found)
    except TimeoutError:
        # Without this pause a few hanging VMMs would occupy all workers.
        await asyncio.sleep(_REST)
        failed = GuestFailed
        reply = protocol.error(found.id, failed.id, failed.exit_code, "it took too long")
    how = reply.decode().splitlines()[-1].split(" ", 1)[1]
    tell(f"{guest}: {' '.join((found.verb, *found.arguments))}: {how}")
    return reply


def _work(host: Runtime, guest: str, request: Request) -> bytes:
    async def work() -> bytes:
        async with asyncio.timeout(_TIMEOUT):
            return await answer(host, guest, request)

    try:
        return asyncio.run(work())
    except TimeoutError:
        raise
    except Exception as error:
        return protocol.error(request.id, "error", 1, f"the host failed ({type(error).__name__})")


class _Turns:
    """A token bucket: ``_BURST`` tokens, and a new one every ``_PAUSE`` seconds."""

    def __init__(self) -> None:
        self._tokens = float(_BURST)
        self._last = time.monotonic()

    async def next(self) -> None:
        """Wait for a token."""
        now = time.monotonic()
        self._tokens = min(_BURST, self._tokens + (now - self._last) / _PAUSE)
        self._last = now
        if self._tokens < 1:
            await asyncio.sleep((1 - self._tokens) * _PAUSE)
        self._tokens -= 1
