"""Clean up when this process exits without having closed its resources.

This covers an exception, sys.exit() and the end of a script. Python waits for all threads first,
except daemon threads. Nothing runs if the process is killed or calls os._exit().
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable


def at_exit(close: Callable[[], None]) -> Callable[[], None]:
    """Have ``close`` called when this process exits.

    Functions run in reverse order of registration. A child of fork(2) does not call them.

    Returns:
        A function that cancels the registration.
    """
    pid = os.getpid()

    def leave() -> None:
        if os.getpid() == pid:
            # Nobody can handle the error here, and the other functions must run too.
            with contextlib.suppress(Exception):
                close()

    atexit.register(leave)
    return lambda: atexit.unregister(leave)
