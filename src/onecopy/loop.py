"""An event loop in a thread, on which the blocking API runs (sync.py)."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Coroutine, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

_T = TypeVar("_T")

NOT_OPEN = "this Host is not open or was closed: use it in a with block, or call open() first"


class LoopThread:
    """An event loop in its own thread that runs coroutines for other threads; a context manager.

    If a caller is interrupted (Ctrl-C), its coroutine is cancelled. The caller continues when the
    coroutine has undone its work.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._entered: list[AbstractAsyncContextManager[Any]] = []
        self._closed: asyncio.Event
        self._loop: asyncio.AbstractEventLoop

    def __enter__(self) -> LoopThread:
        self._ready.clear()
        self._thread = threading.Thread(target=self._serve, name="onecopy-loop", daemon=True)
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, patience: float | None = None) -> None:
        """Cancel all work and stop the thread; wait up to ``patience`` seconds for its end."""
        thread, self._thread = self._thread, None
        if thread is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._closed.set)
            thread.join(patience)

    @property
    def runs(self) -> bool:
        """Whether the loop accepts work."""
        # In a child of fork(2) the thread object exists, but the thread does not run.
        return self._thread is not None and self._thread.is_alive()

    def _serve(self) -> None:
        # During its shutdown Python refuses new threads, which asyncio would start here.
        with contextlib.suppress(RuntimeError):
            asyncio.run(self._until_closed())

    async def _until_closed(self) -> None:
        self._loop, self._closed = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._closed.wait()
        # Exit in reverse order; asyncio would close all asynchronous generators at once.
        while self._entered:
            with contextlib.suppress(BaseException):
                error = asyncio.CancelledError()
                await self._entered.pop().__aexit__(type(error), error, None)

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine on the loop and return its result.

        Raises:
            RuntimeError: the loop does not run, or this is the loop's own thread.
        """
        if not self.runs:
            work.close()
            raise RuntimeError(NOT_OPEN)
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("a callback of onecopy must not call onecopy's blocking API")
        result: Future[_T] = Future()
        tasks: list[asyncio.Task[_T]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(partial(_pass_on, result))

        self._loop.call_soon_threadsafe(begin)
        try:
            return result.result()
        except asyncio.CancelledError:
            if self.runs:
                raise
            raise RuntimeError(NOT_OPEN) from None
        finally:
            if not result.done():
                self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
                wait([result])

    @contextmanager
    def entered(self, manager: AbstractAsyncContextManager[_T]) -> Iterator[_T]:
        """Enter an asynchronous context manager from the caller's thread."""
        if not self.runs:
            raise RuntimeError(NOT_OPEN)
        value = self.run(_awaited(manager.__aenter__()))
        self._entered.append(manager)
        try:
            yield value
        except BaseException as error:
            # The caller's own error is raised even if the manager suppresses it.
            self._exit(manager, error)
            raise
        self._exit(manager, None)

    def _exit(self, manager: AbstractAsyncContextManager[Any], error: BaseException | None) -> None:
        if not self.runs or manager not in self._entered:
            return  # stop() has exited it, or this is a forked child
        self._entered.remove(manager)
        kind, trace = (type(error), error.__traceback__) if error else (None, None)
        self.run(_awaited(manager.__aexit__(kind, error, trace)))


async def _awaited(work: Awaitable[_T]) -> _T:
    return await work


def _pass_on(result: Future[_T], task: asyncio.Task[_T]) -> None:
    if task.cancelled():
        result.set_exception(asyncio.CancelledError())
    elif error := task.exception():
        result.set_exception(error)
    else:
        result.set_result(task.result())
