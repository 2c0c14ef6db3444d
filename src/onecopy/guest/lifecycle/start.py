"""The entry point for starts: plans guests, starts them, or shows their command lines.

The command, the Python API, the demo, plans, pools and benchmarks all start guests here. A start
resolves names, checks options, names guests, numbers ports, checks memory, starts all guests or
none, and refills pools. A dry run refuses what a start refuses, because both use the same checked
plan. Not here: how one guest starts (launcher.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
from msgspec.structs import replace

from onecopy.errors import InvalidInput, OnecopyError
from onecopy.guest.lifecycle import admission, launcher, pool
from onecopy.guest.lifecycle.batch import Started, start_many
from onecopy.guest.lifecycle.disks import check_disks
from onecopy.guest.lifecycle.launchplan import (
    BootSpec,
    CloneSpec,
    LaunchPlan,
    check_guest,
    plan_clone,
)
from onecopy.guest.ports import numbered
from onecopy.guest.run_directory import POOL, Batch, GuestRecord, no_agent
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB, RESERVED, check_guest_name
from onecopy.vmm.accel import in_short
from onecopy.vmm.argv import TRANSLATED

Tell = Callable[[str], None]


class Request(msgspec.Struct, frozen=True):
    """A request for guests."""

    spec: BootSpec | CloneSpec
    count: int = 1
    name: str | None = None
    """The name; several guests get NAME-1 to NAME-N. None: names are made."""
    keep_going: bool = False
    """Whether to keep the other guests if one cannot start."""
    overcommit: bool = False
    """Whether to start the guests even if the host lacks memory for all."""
    needs_agent: bool = False
    """Whether the caller runs a program in the guests."""
    standby: bool = False
    """Whether the VMMs wait in a pool and become clones later (pool.py)."""


class Group(msgspec.Struct, frozen=True):
    """Planned and checked guests that start together.

    Attributes:
        plans: One plan for each guest.
        keep_going: As in `Request`.
    """

    plans: tuple[LaunchPlan, ...]
    each: int = 0
    """Bytes that the host must have for each guest; 0 skips the check."""
    keep_going: bool = False
    refused: tuple[tuple[str, OnecopyError], ...] = ()
    """Pairs (name, error) of the guests that cannot start, with ``keep_going``."""


def _quiet(_: str) -> None:
    pass


def plan(host: Runtime, request: Request, tell: Tell = _quiet) -> Group:
    """Plan guests and check that each can start.

    Raises:
        InvalidInput: A name, port or disk is wrong.
        InsufficientResources: The host has too little memory (admission.py).
        OnecopyError: Any error of `plan_boot`, `plan_clone` and `check_guest`.
    """
    spec, count = request.spec, request.count
    if spec.disks:
        check_disks(spec.disks, named=request.name is not None, count=count)
    names = _names(request)
    made = plan_launch(host, spec, tell)
    if request.needs_agent and not made.config.agent:
        raise no_agent(made.source.ref)
    need = admission.of_plan(made, count)
    if need.translated < TRANSLATED:
        tell(
            f"the host has memory for {need.translated // MIB} MiB of translated code in each "
            f"QEMU, not {TRANSLATED // MIB}: guests that work are slower"
        )
    each = 0 if request.overcommit else need.each
    if each and not request.keep_going:
        admission.require(each, count)
    made = replace(made, translated=need.translated, standby=request.standby)
    plans, refused = [], []
    for number, name in enumerate(names):
        one = made.named(name, spec.publish and numbered(spec.publish, number))
        try:
            if not request.standby:
                check_guest(host, one)
            if each and request.keep_going:
                admission.require(each)
            plans.append(one)
        except OnecopyError as error:
            if not request.keep_going:
                raise
            refused.append((name, error))
    return Group(tuple(plans), each, request.keep_going, tuple(refused))


def _names(request: Request) -> list[str]:
    if request.standby:
        return [f"{POOL}{os.urandom(4).hex()}" for _ in range(request.count)]
    spec = request.spec
    source = spec.root if isinstance(spec, BootSpec) else spec.system
    return names_for(source.name, request.name, request.count)


def names_for(source: str, name: str | None, count: int) -> list[str]:
    """Return ``count`` names: NAME, or NAME-1 to NAME-N, or names made from ``source``."""
    if count < 1:
        raise InvalidInput(f"cannot start {count} guests", hint="give at least 1")
    if name is not None:
        check_guest_name(name)
        names = [name] if count == 1 else [f"{name}-{number}" for number in range(1, count + 1)]
    else:
        stem = source.replace(".", "-").replace("_", "-")[:50].strip("-")
        stem = f"of-{stem}" if stem.startswith(RESERVED) else stem
        run = os.urandom(2).hex()
        names = [f"{stem}-{run}"] if count == 1 else [f"{stem}-{run}-{n + 1}" for n in range(count)]
    return [check_guest_name(each) for each in names]


def plan_launch(host: Runtime, spec: BootSpec | CloneSpec, tell: Tell = _quiet) -> LaunchPlan:
    """Plan guests without names; raise the errors of `plan_boot` and `plan_clone`."""
    if isinstance(spec, CloneSpec):
        return plan_clone(host, spec)
    # A clone needs nothing that prepares a boot.
    from onecopy.guest.lifecycle.bootplan import plan_boot

    made = plan_boot(host, spec, tell)
    tell(f"booting under {made.accel.name} ({in_short(made.accel.reason)})")
    return made


def dry_run(host: Runtime, group: Group) -> list[list[str]]:
    """Return the command line of each guest's QEMU, and start nothing."""
    return [launcher.dry_run(host, one) for one in group.plans]


async def start(
    host: Runtime,
    group: Group,
    *,
    owner: Path | None = None,
    refill: bool = True,
    ran: Callable[[GuestRecord], None] | None = None,
) -> Started:
    """Start guests, all or none (batch.py).

    Args:
        owner: The directory of an owner, with which the guests end (Runtime.owner).
        refill: Fill the pools from which VMMs were taken.
        ran: Called with each guest that runs, before all are handed out.

    Raises:
        OnecopyError: Any error of `start_many` and `launcher.launch`.
    """
    if not group.plans:
        return Started((), group.refused)
    starts = {one.name: partial(launcher.launch, host, one) for one in group.plans}
    started = await start_many(
        host, starts, keep_going=group.keep_going, owner=owner, each=group.each, ran=ran
    )
    if refill and (host.run / pool.SIZES).exists():
        pool.refill(host)
    return replace(started, failures=(*group.refused, *started.failures))


async def start_one(
    host: Runtime, made: LaunchPlan, name: str, batch: Batch | None = None
) -> GuestRecord:
    """Start one guest of a plan of `plan_launch`, without a check of the host's memory."""
    one = made.named(name, made.spec.publish)
    if not one.standby:
        check_guest(host, one)
    return await launcher.launch(host, one, batch)
