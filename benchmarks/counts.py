"""Counts what a VMM has done: VM exits, page faults, bytes read from disks.

Counts do not depend on the machine's speed, so those of an emulated host hold elsewhere.

Source:
    proc_pid_stat(5), proc_pid_io(5); KVM's statistics in debugfs (Linux virt/kvm/kvm_main.c:
    kvm/PID-FD/exits).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from onecopy.linux.files import read_of_process

_KVM = Path("/sys/kernel/debug/kvm")
#: Places of minflt and majflt in /proc/PID/stat, counted behind the program's name.
_MINOR, _MAJOR = 7, 9


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts of a VMM since its start, or medians of several VMMs'."""

    exits: float | None
    """VM exits of all vCPUs; None without KVM or debugfs."""
    faults: float
    """Page faults of the process, minor and major."""
    read: float
    """Bytes read from block devices for the process."""

    @classmethod
    def of(cls, pid: int) -> Counts:
        """Read the counts of a running VMM."""
        return cls(_exits(pid), sum(page_faults(pid)), read_bytes(pid))


def medians(counts: Sequence[Counts]) -> Counts:
    """Return the median of each count."""
    exits = [each.exits for each in counts if each.exits is not None]
    return Counts(
        median(exits) if exits else None,
        median(each.faults for each in counts),
        median(each.read for each in counts),
    )


def _exits(pid: int) -> int | None:
    found = [int(path.read_text()) for path in _KVM.glob(f"{pid}-*/exits")]
    return sum(found) if found else None


def page_faults(pid: int) -> tuple[int, int]:
    """Return the minor and major page faults of a process."""
    text = read_of_process(pid, "stat") or b""
    # The second field may contain blanks.
    fields = text[text.rindex(b")") + 2 :].split()
    return int(fields[_MINOR]), int(fields[_MAJOR])


def read_bytes(pid: int) -> int:
    """Return the bytes read from block devices for a process."""
    found = re.search(rb"^read_bytes: (\d+)$", read_of_process(pid, "io") or b"", re.MULTILINE)
    if not found:
        raise RuntimeError("this kernel has no /proc/PID/io")
    return int(found[1])
