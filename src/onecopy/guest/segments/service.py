"""The service that answers guests who ask for segments by name: `onecopy serve`.

One task for each guest, one request of a guest at a time. A guest that floods its port is read as
slowly as it is served, so it waits for itself; one that does not read its answers loses them; what
takes long runs in a thread, and a guest whose machine does not answer gets none for a while. Not
here: what is done (handlers.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
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
from onecopy.vmm.port_pipe import Pipe

#: Seconds between looks for new guests.
_LOOK = 0.25
#: Requests that a guest may make at once, and seconds until it may make another one.
_BURST, _PAUSE = 20, 0.2
#: Requests of all guests that are worked on at once.
_AT_ONCE = 4
#: Seconds that one may take, for which a guest then rests whose machine took longer, and that it
#: may take to make room for a line of its answer.
_TIMEOUT, _REST, _READING = 60.0, 60.0, 2.0
#: Seconds between two answers to lines that are no requests.
_NONSENSE = 5.0
_CHUNK = 4096

Tell = Callable[[str], None]


async def serve(host: Runtime, tell: Tell = lambda _: None) -> None:
    """Answer all guests of a store, those to come included, until cancelled.

    ``tell`` is told each request. Raises AlreadyExists if another one does.
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
    """Have a task for each run folder, and none for those that are gone."""
    folders = dict(_folders(host.run))
    for key in tasks.keys() - folders.keys():
        tasks.pop(key).cancel()
    for key in folders.keys() - tasks.keys():
        tasks[key] = asyncio.create_task(_guest(host, folders[key], workers, tell, late=late))


def _folders(run: Path) -> Iterator[tuple[tuple[str, int], Path]]:
    """The run folders by name and by what tells one from a later one of that name."""
    for path in run.iterdir():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            yield (path.name, (path / "segment.out").stat().st_ino), path


@contextlib.contextmanager
def _alone(host: Runtime) -> Iterator[None]:
    fd = os.open(host.run / ".serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise AlreadyExists(
            "another `onecopy serve` answers the guests of this store", hint="one is enough"
        ) from error
    finally:
        os.close(fd)


async def _guest(
    host: Runtime, folder: Path, workers: ThreadPoolExecutor, tell: Tell, *, late: bool
) -> None:
    """Answer one guest."""
    lines, turns, rejected = Lines(), _Turns(), float("-inf")
    with contextlib.suppress(OSError, OnecopyError):
        await _handed_out(folder)
        with Pipe(folder, "segment") as pipe:
            if late:
                # Who asked before has given up.
                pipe.drain()
            while True:
                await turns.next()
                for found in lines.feed(await pipe.some(_CHUNK)):
                    if isinstance(found, Request):
                        await turns.next()
                    elif time.monotonic() - rejected < _NONSENSE:
                        continue
                    else:
                        rejected = time.monotonic()
                    await _send(pipe, await _reply(host, folder.name, found, workers, tell))


async def _handed_out(folder: Path) -> None:
    """Wait until a guest that asks while it is started can be given something."""
    while True:
        try:
            RunDirectory(folder).record()
        except NotFound:
            await asyncio.sleep(_LOOK)
        else:
            return


async def _send(pipe: Pipe, reply: bytes) -> None:
    """Whoever asks and does not listen has no answer, or the first lines of one.

    A pipe takes a line as a whole or not at all (pipe(7), PIPE_BUF).
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
    # Copying memory, and a VMM that does not answer, must hold up nobody else.
    try:
        reply = await loop.run_in_executor(workers, _work, host, guest, found)
    except TimeoutError:
        # Else a few such machines would have all workers, always.
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
    """A token bucket: ``_BURST`` at once, then one each ``_PAUSE`` seconds."""

    def __init__(self) -> None:
        self._tokens = float(_BURST)
        self._last = time.monotonic()

    async def next(self) -> None:
        """Wait for a turn."""
        now = time.monotonic()
        self._tokens = min(_BURST, self._tokens + (now - self._last) / _PAUSE)
        self._last = now
        if self._tokens < 1:
            await asyncio.sleep((1 - self._tokens) * _PAUSE)
        self._tokens -= 1
