"""From what a few clones took to what many will: memory, and the time until all are handed out.

Memory: what clones share is there once, and each has something of its own. Time: a start costs
processor time, and clones that run already use some of the processors; so with u of a processor for
each of these, c processor seconds for a start and P processors, N starts take

    integral of c / (P - n u) over n from 0 to N  =  c / u * ln(P / (P - N u)).

Pure. Not here: measuring (guest/observe/plan.py).
"""

from __future__ import annotations

import math

import msgspec


class Work(msgspec.Struct, frozen=True):
    """What is done with each clone before it is looked at."""

    command: str = ""
    """A shell command of the host, with the clone's name as $GUEST; empty: none."""
    port: int = 0
    """Port of the guest that it reaches at 127.0.0.1:$PORT; 0: none."""


class Profile(msgspec.Struct, frozen=True):
    """What clones of one saved system took on one host; bytes and seconds."""

    system: str
    digest: str
    accel: str
    qemu: str
    processors: int
    shared: int
    """Once for all: segments and saved RAM in the page cache."""
    each: int
    """Of each clone's own: its VMM's memory, page tables, and what the kernel keeps for it."""
    start_cpu: float
    """Processor seconds of a start, onecopy's own included."""
    idle: float
    """Share of one processor that a clone uses when it is left alone."""
    clones: int
    """How many were measured."""
    work: Work = Work()


class Forecast(msgspec.Struct, frozen=True):
    """What so many clones would take."""

    guests: int
    hosts: int
    per_host: int
    """Guests of the fullest host."""
    shared: int
    """On each host."""
    memory: int
    """Of the fullest host, with what is shared."""
    seconds: float | None
    """Until all of a host's are handed out; None if its processors would not keep up."""
    busy: float
    """Share of a host's processors that its clones use when they are left alone."""
    fits: bool | None
    """Whether a host has that much memory; None if it was not said how much it has."""


def forecast(
    profile: Profile,
    guests: int,
    *,
    hosts: int | None = None,
    memory: int | None = None,
    processors: int | None = None,
) -> Forecast:
    """``guests`` clones on ``hosts`` hosts with ``memory`` bytes for them each, as alike as can be.

    Without ``hosts`` as many as are needed for the memory, or one. ``processors`` of a host are by
    default as many as where it was measured, and as fast.
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
