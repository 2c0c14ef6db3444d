"""Resource limits on one process (getrlimit(2)).

A limit that may have to grow later is a soft one, because only a privileged process can raise a
hard one. A seccomp filter keeps a confined process from raising its own limits (vmm/confine.py).

Not here: how much a VMM needs (vmm/vmm_limits.py), and limits on groups of processes
(linux/cgroup.py).
"""

from __future__ import annotations

import resource
from collections.abc import Mapping

#: Bytes: the address space, private writable memory in it, and the size of each file.
ADDRESS_SPACE, PRIVATE, FILE_SIZE = resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE
OPEN_FILES, THREADS_OF_USER = resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC
#: Bytes.
CORE, LOCKED, MESSAGES = resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE
#: Counted per user, like THREADS_OF_USER; timers count too.
SIGNALS_OF_USER = resource.RLIMIT_SIGPENDING
UNLIMITED = resource.RLIM_INFINITY

#: These grow when a running VMM gets more resources.
_GROWING = (ADDRESS_SPACE, PRIVATE, FILE_SIZE)

Limits = Mapping[int, int]
"""Resource -> its limit."""


def apply(pid: int, limits: Limits) -> None:
    """Limit a process, up to its hard limits.

    The caller needs the process's user and group, or CAP_SYS_RESOURCE (prlimit(2)).

    Raises:
        OSError: the kernel refused.
    """
    for kind, wanted in limits.items():
        _, hard = resource.prlimit(pid, kind)
        most = _least(wanted, hard)
        resource.prlimit(pid, kind, (most, hard if kind in _GROWING else most))


def raise_to(pid: int, limits: Limits) -> None:
    """Raise the limits of a process to at least ``limits``, up to its hard limits.

    Raises:
        OSError: the kernel refused.
    """
    for kind, wanted in limits.items():
        soft = of(pid, kind)
        if _least(soft, wanted) == soft != wanted:
            apply(pid, {kind: wanted})


def of(pid: int, kind: int) -> int:
    """Return the soft limit of a process.

    Raises:
        OSError: the kernel refused.
    """
    soft, _ = resource.prlimit(pid, kind)
    return soft


def _least(one: int, other: int) -> int:
    if UNLIMITED in (one, other):
        return other if one == UNLIMITED else one
    return min(one, other)
