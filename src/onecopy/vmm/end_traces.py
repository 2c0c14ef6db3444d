"""What QEMU logs about its own end: trace events that it emits at no other time.

No process waits for a guest, so QEMU's exit code is lost. QEMU cancels a migration whenever it ends
in an orderly way, and here at no other time. It also logs who requested the shutdown, unless the
guest reset its machine. A QEMU that was killed or failed logs neither.

Not here: what this means for a guest (guest/end_reason.py).
"""

from __future__ import annotations

import re
from enum import IntEnum

import msgspec

#: trace_qemu_system_shutdown_request() in system/runstate.c; the other event is called
#: migration_cancel from QEMU 10.0 on (migration/migration.c).
_REQUESTED = "qemu_system_shutdown_request"
WANTED = (_REQUESTED, "migrate_fd_cancel", "migration_cancel")
_LINE = re.compile(rf"^\S*({'|'.join(WANTED)}) ?(?:reason=(\d{{1,3}}))?$\n?", re.MULTILINE)


class Cause(IntEnum):
    """QEMU's ShutdownCause (qapi/run-state.json), which later versions only extend."""

    NONE = 0
    HOST_ERROR = 1
    HOST_QMP_QUIT = 2
    HOST_QMP_SYSTEM_RESET = 3
    HOST_SIGNAL = 4
    HOST_UI = 5
    GUEST_SHUTDOWN = 6
    GUEST_RESET = 7
    GUEST_PANIC = 8


class LoggedEnd(msgspec.Struct, frozen=True):
    """The content of qemu.log."""

    cause: Cause | None
    """Who requested the shutdown; None if that is not logged or not known here."""
    in_order: bool
    """Whether QEMU ended in an orderly way."""
    rest: str
    """The rest of the log, without these events."""


def read(log: str) -> LoggedEnd:
    """Parse the output of a QEMU."""
    found = _LINE.findall(log)
    requested = [int(number) for name, number in found if name == _REQUESTED and number]
    known = requested and requested[-1] in set(Cause)
    return LoggedEnd(
        cause=Cause(requested[-1]) if known else None,
        in_order=bool(found),
        rest=_LINE.sub("", log),
    )


def of_binary(printed: str) -> tuple[str, ...]:
    """Return the events that a QEMU supports; empty if they are too few to recognise an end.

    Args:
        printed: its output when it was told to quit with all events in `WANTED` enabled.
    """
    names = {name for name, _ in _LINE.findall(printed)}
    supported = tuple(each for each in WANTED if each in names)
    return supported if _REQUESTED in supported and len(supported) > 1 else ()
