"""When a command can no longer be interrupted."""

from __future__ import annotations

import signal


def ignore() -> None:
    """Ignore signals from now on: the work is done, and only its report is left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
