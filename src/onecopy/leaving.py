"""What has to end with this process, in whatever way a program leaves without closing it.

By an exception, by sys.exit(), at the end of a script: once its threads have ended, as Python has
it, but for those that are daemons. Nothing runs in a process that is killed, or that leaves by
os._exit().
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable


def at_exit(close: Callable[[], None]) -> Callable[[], None]:
    """Have ``close`` called if this process leaves; what this returns takes that back.

    What was given last is called first. In a child of fork(2) it is not called.
    """
    pid = os.getpid()

    def leave() -> None:
        if os.getpid() == pid:
            # Nobody is there to be told, and the rest must end, too.
            with contextlib.suppress(Exception):
                close()

    atexit.register(leave)
    return lambda: atexit.unregister(leave)
