"""Counts what a VMM has done: VM exits, page faults, bytes read from disks.

Counts do not depend on the machine's speed, so those of an emulated host hold elsewhere.

Source:
    proc_pid_stat(5), proc_pid_io(5); KVM's statistics in debugfs (Linux virt/kvm/kvm_main.c:
    kvm/PID-FD/exits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

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
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return cls(_exits(pid), int(stat[_MINOR]) + int(stat[_MAJOR]), _read_bytes(pid))


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


def _read_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))
