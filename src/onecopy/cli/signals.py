"""When a command can no longer be interrupted."""

from __future__ import annotations

import signal


def ignore() -> None:
    """From now on all is done or undone: nothing ends the command before it has told so."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
