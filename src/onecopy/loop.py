"""An event loop in a thread, for callers that have none; the blocking face runs on it (sync.py)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Coroutine, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

_T = TypeVar("_T")


class LoopThread:
    """Runs what any number of threads give it; a context manager.

    A caller that is interrupted (Ctrl-C) has its work cancelled, and goes on when all that was
    begun is undone.
    """

    def __init__(self) -> None:
        self._thread = threading.Thread(target=self._serve, name="onecopy-loop", daemon=True)
        self._ready = threading.Event()
        self._closed: asyncio.Event
        self._loop: asyncio.AbstractEventLoop

    def __enter__(self) -> LoopThread:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._closed.set)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.run(self._until_closed())

    async def _until_closed(self) -> None:
        self._loop, self._closed = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._closed.wait()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What comes of ``work``."""
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("what onecopy calls back must not wait for onecopy")
        result: Future[_T] = Future()
        tasks: list[asyncio.Task[_T]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(partial(_pass_on, result))

        self._loop.call_soon_threadsafe(begin)
        try:
            return result.result()
        finally:
            if not result.done():
                self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
                wait([result])

    @contextmanager
    def entered(self, manager: AbstractAsyncContextManager[_T]) -> Iterator[_T]:
        """``manager`` as a context manager of the caller's."""
        value = self.run(_awaited(manager.__aenter__()))
        try:
            yield value
        except BaseException as error:
            # Whether it passes the error on or not, it is the caller's own.
            self.run(_awaited(manager.__aexit__(type(error), error, error.__traceback__)))
            raise
        self.run(_awaited(manager.__aexit__(None, None, None)))


async def _awaited(work: Awaitable[_T]) -> _T:
    return await work


def _pass_on(result: Future[_T], task: asyncio.Task[_T]) -> None:
    if task.cancelled():
        result.set_exception(asyncio.CancelledError())
    elif error := task.exception():
        result.set_exception(error)
    else:
        result.set_result(task.result())
