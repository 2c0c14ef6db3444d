"""The door to guests: plan them, start them, or show how they would be started.

The command, the Python API, the demo, plans, pools and benchmarks all start guests here: resolve,
check, name, number the ports, admit, start all or none, fill pools again. A dry run refuses what a
start refuses, since both get the same checked plan. Not here: how one guest starts (launcher.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
from msgspec.structs import replace

from onecopy.errors import InvalidInput, OnecopyError
from onecopy.guest.lifecycle import admission, launcher, pool
from onecopy.guest.lifecycle.batch import Started, start_many
from onecopy.guest.lifecycle.bootplan import plan_boot
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
    """Guests that a user asks for."""

    spec: BootSpec | CloneSpec
    count: int = 1
    name: str | None = None
    """NAME, or NAME-1..N for several; None: one is made."""
    keep_going: bool = False
    """If a guest cannot start, keep the others."""
    overcommit: bool = False
    """Start them even if the host may not have the memory for all."""
    needs_agent: bool = False
    """Something is to be run in them."""
    standby: bool = False
    """They are to wait, and become clones later (pool.py)."""


class Group(msgspec.Struct, frozen=True):
    """Guests that are to start together, planned and checked."""

    plans: tuple[LaunchPlan, ...]
    each: int = 0
    """Bytes that the host must have for each; 0: it is not looked at."""
    keep_going: bool = False
    refused: tuple[tuple[str, OnecopyError], ...] = ()
    """(name, why) of those that cannot start, while others are to."""


def _quiet(_: str) -> None:
    pass


def plan(host: Runtime, request: Request, tell: Tell = _quiet) -> Group:
    """Plan guests, and check that they can start, each of them.

    Raises what making a plan raises (bootplan.py, launchplan.py), what keeps guests from starting
    (`check_guest`), InvalidInput (names, ports, disks), InsufficientResources (admission.py).
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
        return [f"{POOL}{secrets.token_hex(4)}" for _ in range(request.count)]
    spec = request.spec
    source = spec.root if isinstance(spec, BootSpec) else spec.system
    return names_for(source.name, request.name, request.count)


def names_for(source: str, name: str | None, count: int) -> list[str]:
    """Names for ``count`` new guests: ``name`` or NAME-1..N, else ones made from ``source``."""
    if count < 1:
        raise InvalidInput(f"{count} guests cannot be started", hint="start at least one")
    if name is not None:
        check_guest_name(name)
        names = [name] if count == 1 else [f"{name}-{number}" for number in range(1, count + 1)]
    else:
        stem = source.replace(".", "-").replace("_", "-")[:50].strip("-")
        stem = f"of-{stem}" if stem.startswith(RESERVED) else stem
        run = secrets.token_hex(2)
        names = [f"{stem}-{run}"] if count == 1 else [f"{stem}-{run}-{n + 1}" for n in range(count)]
    return [check_guest_name(each) for each in names]


def plan_launch(host: Runtime, spec: BootSpec | CloneSpec, tell: Tell = _quiet) -> LaunchPlan:
    """Plan guests of a kind, that have no names yet; raises as `plan`."""
    if isinstance(spec, CloneSpec):
        return plan_clone(host, spec)
    made = plan_boot(host, spec, tell)
    tell(f"booting under {made.accel.name} ({in_short(made.accel.reason)})")
    return made


def dry_run(host: Runtime, group: Group) -> list[list[str]]:
    """The command line of each guest's QEMU; nothing is started."""
    return [launcher.dry_run(host, one) for one in group.plans]


async def start(
    host: Runtime,
    group: Group,
    *,
    owner: Path | None = None,
    refill: bool = True,
    ran: Callable[[GuestRecord], None] | None = None,
) -> Started:
    """Start guests, all or none (batch.py), and fill pools from which some were taken.

    Those of an ``owner`` (Runtime.owner) end with it. ``ran`` is called of each guest that runs,
    before all are handed out.
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
    """Start one guest of a kind that was planned (`plan_launch`), whatever memory there is."""
    one = made.named(name, made.spec.publish)
    if not one.standby:
        check_guest(host, one)
    return await launcher.launch(host, one, batch)
