"""What QEMU notes of its own end in qemu.log, by trace events that it has at no other time.

No process of ours waits for a guest, so nobody sees its QEMU's exit code. QEMU calls off a
migration whenever it ends in an orderly way, and never else here; and it notes who had it shut
down, unless the guest reset its machine. A QEMU that was killed, or failed, notes nothing. Not
here: what that says about a guest (guest/end_reason.py).
"""

from __future__ import annotations

import re
from enum import IntEnum

import msgspec

#: trace_qemu_system_shutdown_request() in system/runstate.c; the other is called
#: migration_cancel from QEMU 10.0 on (migration/migration.c).
_REQUESTED = "qemu_system_shutdown_request"
WANTED = (_REQUESTED, "migrate_fd_cancel", "migration_cancel")
_LINE = re.compile(rf"^\S*({'|'.join(WANTED)}) ?(?:reason=(\d{{1,3}}))?$\n?", re.MULTILINE)


class Cause(IntEnum):
    """QEMU's ShutdownCause (qapi/run-state.json), which later versions only add to."""

    NONE = 0
    HOST_ERROR = 1
    HOST_QMP_QUIT = 2
    HOST_QMP_SYSTEM_RESET = 3
    HOST_SIGNAL = 4
    HOST_UI = 5
    GUEST_SHUTDOWN = 6
    GUEST_RESET = 7
    GUEST_PANIC = 8


class Noted(msgspec.Struct, frozen=True):
    """What qemu.log says."""

    cause: Cause | None
    """Who had it shut down; None if it notes nothing, or what is not known here."""
    in_order: bool
    """Whether it ended in an orderly way."""
    rest: str
    """All that is no note of its end."""


def read(log: str) -> Noted:
    """Read what a QEMU printed."""
    found = _LINE.findall(log)
    requested = [int(number) for name, number in found if name == _REQUESTED and number]
    known = requested and requested[-1] in set(Cause)
    return Noted(
        cause=Cause(requested[-1]) if known else None,
        in_order=bool(found),
        rest=_LINE.sub("", log),
    )


def of_binary(printed: str) -> tuple[str, ...]:
    """The events that a QEMU has which printed this when it was told to quit with all `WANTED`.

    Empty if that is not enough to know an end by.
    """
    names = {name for name, _ in _LINE.findall(printed)}
    had = tuple(each for each in WANTED if each in names)
    return had if _REQUESTED in had and len(had) > 1 else ()
