"""User numbers that nobody has: neither a VMM that lives, nor a file that one has left.

Not here: which numbers there are (vmm_user.py).
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Container
from pathlib import Path

from onecopy.errors import Incompatible
from onecopy.linux import vmm_registry

#: With fewer than this two guests would get the same one some time, if it were left to chance.
MANY = 1 << 20
_TRIES = 1000
#: Where systemd notes which of its dynamic users there are (systemd docs/UIDS-GIDS.md).
_SYSTEMD = Path("/run/systemd/dynamic-uid")


def unused(numbers: range) -> int:
    """One of ``numbers`` that nobody has; raise Incompatible if there is none.

    Of few it is this process's until it puts a VMM with it on record, or ends: nobody else gets it.
    """
    if len(numbers) >= MANY:
        return _choose(numbers, vmm_registry.users())
    with vmm_registry.reserving() as reserve:
        number = _choose(numbers, vmm_registry.users() | _of_processes())
        reserve(number)
    return number


def _choose(numbers: range, taken: Container[int]) -> int:
    for _ in range(_TRIES):
        number = secrets.choice(numbers)
        if number not in taken and not (_SYSTEMD / str(number)).exists():
            return number
    raise Incompatible(
        f"all user numbers that guests can have here are taken ({len(numbers)})",
        hint="stop guests; or give this container more numbers (user_namespaces(7))",
    )


def _of_processes() -> set[int]:
    """The user numbers of all processes; reading them takes too long where there are many."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found.add(entry.stat().st_uid)
    return found
