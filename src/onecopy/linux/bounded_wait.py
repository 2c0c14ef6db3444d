"""Query many processes without waiting indefinitely for any of them.

A process can block whoever reads its memory map or command line in the kernel. It may leave a page
fault unserved (userfaultfd(2)) or hold the lock on its memory map. Only SIGKILL ends such a wait,
so each query runs in a daemon thread. A stuck thread is abandoned and ends with this process.

Not here: the queries themselves.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")

#: Seconds between looks for late jobs, while no job finishes. A job's time is counted in looks, not
#: by the clock: if this process itself was stopped or did not get a processor, no job was late.
_POLL_INTERVAL = 0.1
#: After this many late jobs, the others get this fraction of the time: the cause may be the same.
_MISSED_BEFORE_HURRY, _HURRY_FACTOR = 4, 0.05
_current_thread = threading.local()


class _Worker(Generic[_T, _R]):
    """A thread that runs one job after another until it is abandoned."""

    def __init__(
        self,
        function: Callable[[_T], _R],
        jobs: deque[tuple[int, _T]],
        done: queue.SimpleQueue[tuple[int, _R | None, BaseException | None]],
    ) -> None:
        self._function, self._jobs, self._done = function, jobs, done
        self._lock = threading.Lock()
        self._looks = 0
        self._number: int | None = None
        self._abandoned = False
        threading.Thread(target=self._work, daemon=True, name="onecopy asks").start()

    def going_on(self) -> None:
        self._looks = 0

    def abandon_if_late(self, seconds: float) -> int | None:
        """Abandon the thread if its job has run for ``seconds``; return its number or None."""
        with self._lock:
            self._looks += 1
            if self._number is None or self._looks * _POLL_INTERVAL <= seconds:
                return None
            self._abandoned = True
            return self._number

    def _work(self) -> None:
        _current_thread.worker = self
        while self._next():
            result, failure = None, None
            try:
                result = self._function(self._item)
            except BaseException as error:
                failure = error
            with self._lock:
                if self._abandoned or self._number is None:
                    return
                self._done.put((self._number, result, failure))
                self._number = None

    def _next(self) -> bool:
        with self._lock:
            try:
                number, self._item = self._jobs.popleft()
            except IndexError:
                return False
            self._looks, self._number = 0, number
            return True


def going_on() -> None:
    """Report progress from within a query: its time limit starts again."""
    worker = getattr(_current_thread, "worker", None)
    if worker:
        worker.going_on()


def each(
    function: Callable[[_T], _R],
    items: Sequence[_T],
    late: Callable[[_T], _R],
    *,
    seconds: float,
    at_once: int = 1,
) -> list[_R]:
    """Call ``function`` for each item and bound the time of each call.

    Args:
        late: makes the result for an item whose call took too long.
        seconds: the limit for one call; each call of `going_on` restarts it.
        at_once: the number of calls that run at the same time.

    Returns:
        The results, in the order of ``items``.

    Raises:
        Exception: whatever ``function`` raises.
    """
    jobs, results = deque(enumerate(items)), dict[int, _R]()
    done = queue.SimpleQueue[tuple[int, _R | None, BaseException | None]]()
    workers = [_Worker(function, jobs, done) for _ in range(min(at_once, len(items)))]
    patience, missed = seconds, 0
    try:
        while len(results) < len(items):
            try:
                number, result, failure = done.get(timeout=_POLL_INTERVAL)
            except queue.Empty:
                for index, worker in enumerate(workers):
                    if (lost := worker.abandon_if_late(patience)) is not None:
                        results[lost] = late(items[lost])
                        missed += 1
                        patience = (
                            seconds if missed < _MISSED_BEFORE_HURRY else seconds * _HURRY_FACTOR
                        )
                        workers[index] = _Worker(function, jobs, done)
                continue
            if failure:
                raise failure
            results[number] = result  # type: ignore[assignment]
    finally:
        jobs.clear()
    return [results[number] for number in range(len(items))]
