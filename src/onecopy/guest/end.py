"""The end of a guest that nobody stopped, as records keep it.

Not here: finding the reason (end_reason.py), the records (ended_guests.py).
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Cause(StrEnum):
    """The kind of an end."""

    POWERED_OFF = "powered-off"
    REBOOTED = "rebooted"
    """The guest rebooted, or its machine was reset, on which QEMU exits."""
    HALTED = "halted"
    PANIC = "kernel-panic"
    COMMAND = "command-ended"
    """The guest's command under the minimal init ended (`--command`)."""
    OUT_OF_MEMORY = "out-of-memory"
    """Out of memory in the guest: its kernel panicked or killed its command."""
    KILLED = "killed"
    """QEMU was killed."""
    HOST_OUT_OF_MEMORY = "host-out-of-memory"
    """The host's kernel killed its QEMU."""
    FAILED = "qemu-failed"
    UNKNOWN = "unknown"


class Ended(msgspec.Struct, frozen=True):
    """The end of a guest that nobody stopped."""

    at: float | None
    """Time of the end, in seconds since 1970; None if QEMU did not log it."""
    found: float
    """Time at which a command found the guest ended, in seconds since 1970."""
    cause: Cause
    reason: str
    """The reason as text."""
    exit_code: int | None
    """Exit code of the guest's command, if that ended the guest."""
