"""Limits on one process: how much of the host it may use, whatever it does (getrlimit(2)).

A limit that may have to grow later is soft: only a privileged process raises a hard one again. A
seccomp filter keeps a confined process from raising its own (vmm/confine.py). Not here: how much a
VMM needs (vmm/vmm_limits.py), and limits on groups of processes (linux/cgroup.py).
"""

from __future__ import annotations

import resource
from collections.abc import Mapping

#: Bytes of address space, and of private writable memory in it; bytes that a file may have.
ADDRESS_SPACE, PRIVATE, FILE_SIZE = resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE
OPEN_FILES, THREADS_OF_USER = resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC
#: Bytes.
CORE, LOCKED, MESSAGES = resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE
#: Of the user, like THREADS_OF_USER: timers count, too.
SIGNALS_OF_USER = resource.RLIMIT_SIGPENDING
UNLIMITED = resource.RLIM_INFINITY

#: Those that grow with what a running VMM is given.
_GROWING = (ADDRESS_SPACE, PRIVATE, FILE_SIZE)

Limits = Mapping[int, int]
"""Resource -> its limit."""


def apply(pid: int, limits: Limits) -> None:
    """Limit a process, as far as its hard limits go; raise OSError.

    That takes to be the process's user and group, or CAP_SYS_RESOURCE (prlimit(2)).
    """
    for kind, wanted in limits.items():
        _, hard = resource.prlimit(pid, kind)
        most = _least(wanted, hard)
        resource.prlimit(pid, kind, (most, hard if kind in _GROWING else most))


def raise_to(pid: int, limits: Limits) -> None:
    """Let a process have at least as much, as far as its hard limits go; raise OSError."""
    for kind, wanted in limits.items():
        soft = of(pid, kind)
        if _least(soft, wanted) == soft != wanted:
            apply(pid, {kind: wanted})


def of(pid: int, kind: int) -> int:
    """The limit on a process; raise OSError."""
    soft, _ = resource.prlimit(pid, kind)
    return soft


def _least(one: int, other: int) -> int:
    if UNLIMITED in (one, other):
        return other if one == UNLIMITED else one
    return min(one, other)
