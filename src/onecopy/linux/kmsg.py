"""Find out from the kernel log why processes died: killed for lack of memory, or crashed.

Reading the log takes root or CAP_SYSLOG.

Not here: what a death means for a guest (guest/end_reason.py).

Source:
    Linux Documentation/ABI/testing/dev-kmsg; __oom_kill_process() in mm/oom_kill.c,
    show_signal_msg() in arch/x86/mm/fault.c.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

PATH = Path("/dev/kmsg")
#: Seconds of tolerance: the clock of start times is coarser than that of the log.
_SLACK = 1.0
_RECORD = 8192
#: The log has process ids of the initial namespace (PROC_PID_INIT_INO).
_FIRST_NAMESPACE = "pid:[4026531836]"
_OOM = re.compile(
    r"(Memory cgroup out of memory|Out of memory(?: \([^)]*\))?): Killed process (\d{1,10}) "
    r"\([^)]*\)(?:.* UID:(\d{1,10}))?"
)
_CRASH = re.compile(
    r"(?:traps: )?[^ \[\]]*\[(\d{1,10})\]:? ((?:segfault|general protection|trap) .*)"
)


class Death(msgspec.Struct, frozen=True):
    """The death of one process."""

    pid: int
    uid: int | None
    """None if the message does not say: older kernels omit it."""
    at: float
    """Seconds since the host's boot."""
    why: str
    """``out of memory``, ``out of memory in its control group``, or the kind of crash."""


def deaths(path: Path = PATH) -> list[Death]:
    """List all deaths in the log, oldest first; empty if this user may not read the log."""
    with contextlib.suppress(OSError):
        if str(Path("/proc/self/ns/pid").readlink()) == _FIRST_NAMESPACE:
            return [death for line in _records(path) if (death := parse(line))]
    return []


def of(found: list[Death], pid: int, uid: int, began: float) -> Death | None:
    """Find the death of a process.

    Args:
        found: deaths, oldest first.
        uid: the user that the process ran as.
        began: its start, in seconds since the host's boot.
    """
    # The log's clock does not advance while the host is suspended.
    asleep = time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    candidates = (
        each
        for each in reversed(found)
        if each.pid == pid and each.uid in (None, uid) and each.at + asleep + _SLACK >= began
    )
    return next(candidates, None)


def parse(record: str) -> Death | None:
    """Parse a record of /dev/kmsg: ``PRIORITY,SEQUENCE,MICROSECONDS,FLAGS;TEXT``."""
    head, _, text = record.partition(";")
    fields = head.split(",")
    # Only the kernel's messages have facility 0; privileged processes write others.
    if len(fields) < 3 or not fields[0].isdecimal() or int(fields[0]) > 7:
        return None
    if not fields[2].isdecimal():
        return None
    at = int(fields[2]) / 1e6
    if match := _OOM.match(text):
        where = " in its control group" if match[1].startswith("Memory cgroup") else ""
        uid = int(match[3]) if match[3] else None
        return Death(int(match[2]), uid, at, f"out of memory{where}")
    if match := _CRASH.match(text):
        return Death(int(match[1]), None, at, re.split(" ip[: ]", match[2])[0])
    return None


def _records(path: Path) -> Iterator[str]:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while True:
            try:
                record = os.read(fd, _RECORD)
            except BrokenPipeError:
                continue  # the record was overwritten meanwhile
            except BlockingIOError:
                return
            if not record:
                return
            yield record.decode(errors="replace").split("\n")[0]
    finally:
        os.close(fd)
