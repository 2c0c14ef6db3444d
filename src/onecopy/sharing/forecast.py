"""Project the memory and start time of many clones from the measurements of a few.

Memory: what clones share exists once, and each clone has memory of its own.

Time: a start takes CPU time, and running clones already use some. Let u be the CPUs that each
running clone uses, c the CPU seconds of a start, and P the number of CPUs. Then N starts take

    integral of c / (P - n u) over n from 0 to N  =  c / u * ln(P / (P - N u)).

The functions are pure.

Not here: measuring (guest/observe/plan.py).
"""

from __future__ import annotations

import math

import msgspec


class Work(msgspec.Struct, frozen=True):
    """What happens in each clone before it is measured."""

    command: str = ""
    """A shell command of the host, with the clone's name in $GUEST; "" for none."""
    port: int = 0
    """A port of the guest that the command reaches at 127.0.0.1:$PORT; 0 for none."""


class Profile(msgspec.Struct, frozen=True):
    """What clones of a saved system took on one host, in bytes and seconds."""

    system: str
    digest: str
    accel: str
    qemu: str
    processors: int
    shared: int
    """Memory for all clones together: segments and saved RAM in the page cache."""
    each: int
    """Memory of each clone: its VMM, page tables, and kernel memory."""
    start_cpu: float
    """CPU seconds of a start, onecopy's own included."""
    idle: float
    """CPUs that an idle clone uses."""
    clones: int
    """The number of clones measured."""
    work: Work = Work()


class Forecast(msgspec.Struct, frozen=True):
    """What a number of clones would take."""

    guests: int
    hosts: int
    per_host: int
    """Guests on the fullest host."""
    shared: int
    """Shared memory on each host."""
    memory: int
    """Memory on the fullest host, shared memory included."""
    seconds: float | None
    """Time until all clones of a host are ready; None if its CPUs would not suffice."""
    busy: float
    """The share of a host's CPUs that idle clones use."""
    fits: bool | None
    """Whether a host has enough memory; None if its memory is unknown."""


def forecast(
    profile: Profile,
    guests: int,
    *,
    hosts: int | None = None,
    memory: int | None = None,
    processors: int | None = None,
) -> Forecast:
    """Forecast the memory and time for clones that are spread evenly over hosts.

    Args:
        hosts: by default as many as the memory requires, or one.
        memory: bytes for guests on each host.
        processors: CPUs of each host; by default as many as on the measured one, at the same speed.
    """
    if hosts is None:
        hosts = 1 if memory is None else _hosts(profile, guests, memory)
    per_host = math.ceil(guests / hosts)
    needed = profile.shared + per_host * profile.each
    count = processors or profile.processors
    return Forecast(
        guests=guests,
        hosts=hosts,
        per_host=per_host,
        shared=profile.shared,
        memory=needed,
        seconds=_seconds(profile, per_host, count),
        busy=per_host * profile.idle / count,
        fits=None if memory is None else needed <= memory,
    )


def _hosts(profile: Profile, guests: int, memory: int) -> int:
    fit = (memory - profile.shared) // max(profile.each, 1)
    return math.ceil(guests / fit) if fit > 0 else guests


def _seconds(profile: Profile, guests: int, processors: int) -> float | None:
    used = guests * profile.idle
    if used >= processors:
        return None
    if used < 1e-9:
        return guests * profile.start_cpu / processors
    return profile.start_cpu / profile.idle * math.log(processors / (processors - used))
