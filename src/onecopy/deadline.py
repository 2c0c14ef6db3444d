"""When something must be over: made once from what the user asked for, and passed down.

Deadlines nest: whatever waits below `Deadline.scope` is ended with it, whatever time of its own it
has. What is tidied up afterwards has a bound of its own (`grace`), so that a command ends at most
two seconds later than it was asked to.
"""

from __future__ import annotations

import asyncio
import time

import msgspec


class Deadline(msgspec.Struct, frozen=True):
    """A moment; ``when`` is in seconds of time.monotonic(), which event loops go by, or None."""

    when: float | None = None

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """The moment ``seconds`` from now; never, if that is None."""
        return cls(None if seconds is None else time.monotonic() + seconds)

    def left(self) -> float | None:
        """Seconds until then, at least 0; None if it never comes."""
        return None if self.when is None else max(self.when - time.monotonic(), 0.0)

    def sooner(self, seconds: float) -> Deadline:
        """This moment, or ``seconds`` from now if that comes first."""
        other = time.monotonic() + seconds
        return Deadline(other if self.when is None else min(self.when, other))

    def scope(self) -> asyncio.Timeout:
        """An asynchronous context that raises TimeoutError at that moment."""
        return asyncio.timeout_at(self.when)
