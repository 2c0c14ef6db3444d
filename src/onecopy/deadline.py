"""Deadlines: computed once from the user's timeout and passed down.

Deadlines nest. A deadline ends every wait inside its `Deadline.scope`, whatever timeout the inner
wait has. Cleanup afterwards has its own bound, so that a command ends at most two seconds after its
timeout.
"""

from __future__ import annotations

import asyncio
import time

import msgspec


class Deadline(msgspec.Struct, frozen=True):
    """A moment in seconds of time.monotonic(), the clock of event loops; None is never."""

    when: float | None = None

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """Return the moment ``seconds`` from now; None means never."""
        return cls(None if seconds is None else time.monotonic() + seconds)

    def left(self) -> float | None:
        """Return the seconds until the deadline, at least 0; None if it never comes."""
        return None if self.when is None else max(self.when - time.monotonic(), 0.0)

    def sooner(self, seconds: float) -> Deadline:
        """Return this deadline or the one ``seconds`` from now, whichever is earlier."""
        other = time.monotonic() + seconds
        return Deadline(other if self.when is None else min(self.when, other))

    def scope(self) -> asyncio.Timeout:
        """Return an asynchronous context manager that raises TimeoutError at the deadline."""
        return asyncio.timeout_at(self.when)
