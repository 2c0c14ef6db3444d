"""The door to guests: plan them, start them, or show how they would be started.

The command, the Python API, the demo, plans, pools and benchmarks all start guests here: resolve,
check, name, number the ports, admit, start all or none, fill pools again. A dry run refuses what a
start refuses, since both get the same checked plan. Not here: how one guest starts (launcher.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec.structs import replace

from onecopy.errors import OnecopyError
from onecopy.guest.lifecycle import admission, launcher, pool
from onecopy.guest.lifecycle.batch import Started, names_for, start_many
from onecopy.guest.lifecycle.bootplan import plan_boot
from onecopy.guest.lifecycle.cloneplan import plan_clone
from onecopy.guest.lifecycle.disks import check_disks
from onecopy.guest.lifecycle.launchplan import (
    BootSpec,
    CloneSpec,
    LaunchPlan,
    check,
    check_guest,
)
from onecopy.guest.ports import numbered
from onecopy.guest.run_directory import POOL, Batch, GuestRecord, no_agent
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB
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

    Raises what making a plan raises (bootplan.py, cloneplan.py), what keeps guests from starting
    (launchplan.py), InvalidInput (names, ports, disks), InsufficientResources (admission.py).
    """
    spec, count = request.spec, request.count
    check_disks(spec.disks, named=request.name is not None, count=count)
    made = plan_launch(host, spec, tell)
    names = _names(made, request)
    if request.needs_agent and not made.config.agent:
        raise no_agent(made.source.ref)
    need = admission.of_plan(made, count)
    _tell_of_room(need.translated, tell)
    made = replace(made, translated=need.translated, standby=request.standby)
    plans = [made.named(name, numbered(spec.publish, at)) for at, name in enumerate(names)]
    each = 0 if request.overcommit else need.each
    if each and not request.keep_going:
        admission.require(each, count)
    refused = [] if request.standby else _refused(host, plans, each, keep=request.keep_going)
    left = tuple(one for one in plans if one.name not in {name for name, _ in refused})
    return Group(left, each, request.keep_going, tuple(refused))


def plan_launch(host: Runtime, spec: BootSpec | CloneSpec, tell: Tell = _quiet) -> LaunchPlan:
    """Plan guests of a kind, that have no names yet; raises as `plan`."""
    if isinstance(spec, BootSpec):
        made = plan_boot(host, spec, tell)
        tell(f"booting under {made.accel.name} ({in_short(made.accel.reason)})")
    else:
        made = plan_clone(host, spec)
    check(host, made)
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
    ran: Callable[[GuestRecord], None] = lambda _: None,
) -> Started:
    """Start guests, all or none (batch.py), and fill pools from which some were taken.

    Those of an ``owner`` (Runtime.owner) end with it. ``ran`` is called of each guest that runs,
    before all are handed out.
    """
    plans = {one.name: one for one in group.plans}

    async def one(name: str, batch: Batch) -> GuestRecord:
        record = await launcher.launch(host, plans[name], batch)
        ran(record)
        return record

    started = await start_many(
        host, list(plans), one, keep_going=group.keep_going, owner=owner, each=group.each
    )
    if refill:
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


def _names(made: LaunchPlan, request: Request) -> list[str]:
    if request.standby:
        return [f"{POOL}{secrets.token_hex(4)}" for _ in range(request.count)]
    return names_for(made.source.name, request.name, request.count)


def _refused(
    host: Runtime, plans: list[LaunchPlan], each: int, *, keep: bool
) -> list[tuple[str, OnecopyError]]:
    """Check each guest; raise, or with ``keep`` tell, why one cannot start."""
    found = []
    for one in plans:
        try:
            check_guest(host, one)
            if each and keep:
                admission.require(each)
        except OnecopyError as error:
            if not keep:
                raise
            found.append((one.name, error))
    return found


def _tell_of_room(translated: int, tell: Tell) -> None:
    if translated < TRANSLATED:
        tell(
            f"the host has memory for {translated // MIB} MiB of translated code in each "
            f"QEMU, not {TRANSLATED // MIB}: guests that work are slower"
        )
