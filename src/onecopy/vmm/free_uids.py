"""Choose user ids that are not in use by a running VMM or by files that one has left.

Not here: the available range (vmm_user.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Container
from pathlib import Path

from onecopy.errors import Incompatible
from onecopy.linux import vmm_registry

#: In a smaller range, random choice alone would sooner or later give two guests the same id.
MANY = 1 << 20
_TRIES = 1000
#: Where systemd records its dynamic users (systemd docs/UIDS-GIDS.md).
_SYSTEMD = Path("/run/systemd/dynamic-uid")


def unused(numbers: range) -> int:
    """Choose an unused user id.

    In a small range it is reserved for this process, until the process registers a VMM with it or
    ends.

    Raises:
        Incompatible: all ids are in use.
    """
    if len(numbers) >= MANY:
        return _choose(numbers, vmm_registry.users())
    with vmm_registry.reserving() as reserve:
        number = _choose(numbers, vmm_registry.users() | _of_processes(numbers))
        reserve(number)
    return number


def _choose(numbers: range, taken: Container[int]) -> int:
    for _ in range(_TRIES):
        number = _any_of(numbers)
        if number not in taken and not (_SYSTEMD / str(number)).exists():
            return number
    raise Incompatible(
        f"all {len(numbers)} user ids that guests can have here are in use",
        hint="stop some guests, or give this container more user ids (user_namespaces(7))",
    )


def _any_of(numbers: range) -> int:
    # The module secrets would load several others in each start.
    return numbers[int.from_bytes(os.urandom(8)) % len(numbers)]


def _of_processes(numbers: range) -> set[int]:
    """Return the ids that running processes have, which takes too long on a host with many."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                uid = entry.stat().st_uid
                if uid in numbers and _runs(int(entry.name)):
                    found.add(uid)
    return found


def _runs(pid: int) -> bool:
    """Whether a process runs; False for a zombie, which stays where process 1 reaps nobody."""
    pidfd = os.pidfd_open(pid)
    try:
        return not vmm_registry.has_ended(pidfd, 0)
    finally:
        os.close(pidfd)
