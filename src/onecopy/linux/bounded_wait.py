"""Ask about many processes, and wait for none of them for ever.

A process can keep who reads its memory map, or its command line, waiting in the kernel: by a page
fault that it is to serve itself (userfaultfd(2)), or a lock that it holds. Only SIGKILL ends such a
wait, so a thread has it, and is left behind: it ends with this process. Not here: what is read.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")

#: How often is looked for late ones, in seconds; only while nothing else comes.
_LOOK = 0.1
#: After so many late ones the others have less time: they may all be of one kind.
_FEW, _LESS = 4, 0.05
_here = threading.local()


class _Worker(Generic[_T, _R]):
    """A thread that takes one job after the other, until it is given up."""

    def __init__(
        self,
        function: Callable[[_T], _R],
        jobs: deque[tuple[int, _T]],
        done: queue.SimpleQueue[tuple[int, _R | None, BaseException | None]],
    ) -> None:
        self._function, self._jobs, self._done = function, jobs, done
        self._lock = threading.Lock()
        self._since = 0.0
        self._number: int | None = None
        self._given_up = False
        threading.Thread(target=self._work, daemon=True, name="onecopy asks").start()

    def going_on(self) -> None:
        self._since = time.monotonic()

    def give_up(self, seconds: float) -> int | None:
        """The number of a job that has taken longer, which is this thread's last; else None."""
        with self._lock:
            if self._number is None or time.monotonic() - self._since < seconds:
                return None
            self._given_up = True
            return self._number

    def _work(self) -> None:
        _here.worker = self
        while self._next():
            result, failure = None, None
            try:
                result = self._function(self._item)
            except BaseException as error:
                failure = error
            with self._lock:
                if self._given_up or self._number is None:
                    return
                self._done.put((self._number, result, failure))
                self._number = None

    def _next(self) -> bool:
        with self._lock:
            try:
                number, self._item = self._jobs.popleft()
            except IndexError:
                return False
            self._since, self._number = time.monotonic(), number
            return True


def going_on() -> None:
    """Say that what is asked is being answered: the time for it begins anew."""
    worker = getattr(_here, "worker", None)
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
    """What ``function`` returns for each of ``items``, in order; ``late(item)`` if it waits longer.

    ``seconds`` are for one item, and begin anew whenever `going_on` is called. Raises what
    ``function`` raises.
    """
    jobs, results = deque(enumerate(items)), dict[int, _R]()
    done = queue.SimpleQueue[tuple[int, _R | None, BaseException | None]]()
    workers = [_Worker(function, jobs, done) for _ in range(min(at_once, len(items)))]
    patience, missed = seconds, 0
    try:
        while len(results) < len(items):
            try:
                number, result, failure = done.get(timeout=_LOOK)
            except queue.Empty:
                for place, worker in enumerate(workers):
                    if (lost := worker.give_up(patience)) is not None:
                        results[lost] = late(items[lost])
                        missed += 1
                        patience = seconds if missed < _FEW else seconds * _LESS
                        workers[place] = _Worker(function, jobs, done)
                continue
            if failure:
                raise failure
            results[number] = result  # type: ignore[assignment]
    finally:
        jobs.clear()
    return [results[number] for number in range(len(items))]
