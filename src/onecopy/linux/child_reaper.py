"""Reap child processes that may outlive this one (waitpid(2)).

While this process has such children, a thread waits for them. When this process ends, init does.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading

_lock = threading.Lock()
_reaper: _Reaper | None = None


def adopt(pid: int) -> None:
    """Reap a child of this process whenever it ends; no other code may wait for it."""
    global _reaper
    with _lock:
        # In a child of fork(2) the object exists, but the thread does not run.
        if _reaper is None or not _reaper.is_alive():
            _reaper = _Reaper()
            _reaper.add(pid)
            _reaper.start()
        else:
            _reaper.add(pid)


class _Reaper(threading.Thread):
    """A thread that ends, with all descriptors closed, when the last child has ended."""

    def __init__(self) -> None:
        super().__init__(name="onecopy-reaper", daemon=True)
        self._poll = select.epoll()
        self._children: dict[int, int] = {}

    def add(self, pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid
        self._poll.register(pidfd, select.EPOLLIN)

    def run(self) -> None:
        global _reaper
        while True:
            ended = [fd for fd, _ in self._poll.poll()]
            with _lock:
                for fd in ended:
                    # Other code that waits for any child (wait(2)) may have reaped it already.
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(self._children.pop(fd), 0)
                    # Closing is not enough: if a process forked meanwhile, its copy keeps the
                    # descriptor in the set (epoll(7)).
                    self._poll.unregister(fd)
                    os.close(fd)
                if not self._children:
                    self._poll.close()
                    _reaper = None
                    return
