"""Children that live on without us: somebody has to wait for them when they end (waitpid(2)).

While a process has such children a thread of its own does; when the process ends, init does.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading

_lock = threading.Lock()
_reaper: _Reaper | None = None


def adopt(pid: int) -> None:
    """Wait for a child of this process, whenever it ends; nobody else may."""
    global _reaper
    with _lock:
        # After a fork(2) it is there, but does not run.
        if _reaper is None or not _reaper.is_alive():
            _reaper = _Reaper()
            _reaper.add(pid)
            _reaper.start()
        else:
            _reaper.add(pid)


class _Reaper(threading.Thread):
    """Ends, and keeps no descriptor, when the last child has ended."""

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
                    # Whoever waits for any child (wait(2)) may have been faster.
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(self._children.pop(fd), 0)
                    # Closing alone would leave it in the set while a process forked meanwhile has
                    # it, too (epoll(7)).
                    self._poll.unregister(fd)
                    os.close(fd)
                if not self._children:
                    self._poll.close()
                    _reaper = None
                    return
