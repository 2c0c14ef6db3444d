"""Protects the end of a command from interrupts."""

from __future__ import annotations

import signal


def ignore() -> None:
    """Ignore signals from now on, because only the report of finished work is left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
