"""The four ways to run the same guest, and the measurement that is the same for all of them.

Guests are started one after another, each when the one before has answered: the host's processors
then serve one start at a time. Not here: single figures (figures.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.answers import answered, before, free_port
from benchmarks.figures import Kind, Running, Spread, evict, memory, settled
from benchmarks.merging import Merged, merged
from benchmarks.places import Place, places
from benchmarks.plain import disk_module, start_plain
from benchmarks.setup import Setup, application
from onecopy.guest.lifecycle.start import start_one
from onecopy.guest.observe.accounts import guest_maps
from onecopy.guest.run_directory import GuestRecord, RunDirectory
from onecopy.linux import process
from onecopy.linux.counters import meminfo
from onecopy.sharing.account import GuestMaps

Starter = Callable[[Setup, contextlib.AsyncExitStack], Awaitable[Running]]
Tell = Callable[[str], None]


def new_name() -> str:
    """For one guest."""
    return f"bench-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class Group:
    """Guests of one kind that run now, and what was measured."""

    kind: Kind
    guests: list[Running]
    before: meminfo.MemInfo


@contextlib.asynccontextmanager
async def _group(
    setup: Setup, name: str, count: int, start: Starter, files: Sequence[Path]
) -> AsyncIterator[Group]:
    """``count`` guests, measured; all are ended when the block is left."""
    disk_module(setup)
    evict(files)
    at_first = meminfo.read()
    async with contextlib.AsyncExitStack() as ends:
        guests = [await start(setup, ends) for _ in range(count)]
        idle = await settled([guest.maps.pid for guest in guests])
        kind = Kind(
            name=name,
            guests=count,
            first=guests[0].seconds,
            seconds=Spread.of(guest.seconds for guest in guests[1:]),
            memory=memory(guests, at_first),
            cpu=Spread.of(guest.cpu for guest in guests).median,
            idle=idle,
        )
        yield Group(kind, guests, at_first)


async def start_one_plain(setup: Setup, ends: contextlib.AsyncExitStack) -> Running:
    name, port, began = new_name(), free_port(), time.monotonic()
    vmm = start_plain(setup, name, application(), ((port, 80),))
    ends.push_async_callback(vmm.kill)
    await before(vmm.wait(), answered(port, name))
    maps = GuestMaps(name, vmm.pid, None, setup.prepared.hardware.memory)
    return Running(maps, time.monotonic() - began, process.cpu_seconds(vmm.pid))


async def start_one_cold(setup: Setup, ends: contextlib.AsyncExitStack) -> Running:
    name, port, began = new_name(), free_port(), time.monotonic()
    # onecopy hands a guest out when it is ready by its own sign; here the answer is the sign.
    prepared = setup.prepared.varied(publish=((port, 80),), ready=None)

    async def boot() -> GuestRecord:
        record = await start_one(setup.host, prepared, name)
        ends.callback(setup.host.end, record)
        return record

    async def answer() -> tuple[float, float]:
        await answered(port, name)
        seconds, pid = time.monotonic() - began, RunDirectory(setup.host.run / name).find_vmm()
        return seconds, process.cpu_seconds(pid or 0)

    async with asyncio.TaskGroup() as tasks:
        booting, answering = tasks.create_task(boot()), tasks.create_task(answer())
    (maps,) = guest_maps([booting.result()])
    return Running(maps, *answering.result())


async def start_one_saved(setup: Setup, ends: contextlib.AsyncExitStack) -> Running:
    name, began = new_name(), time.monotonic()
    record = await start_one(setup.host, setup.saved.varied(publish=((0, 80),)), name)
    ends.callback(setup.host.end, record)
    await answered(record.publish[0][0], name)
    (maps,) = guest_maps([record])
    return Running(maps, time.monotonic() - began, process.cpu_seconds(record.pid))


async def _after(group: Group, merging: Merged) -> Kind:
    """The group's figures now that KSM has merged its pages."""
    idle = await settled([guest.maps.pid for guest in group.guests])
    return dataclasses.replace(
        group.kind,
        name="ksm",
        memory=memory(group.guests, group.before),
        idle=idle,
        helper_cpu=merging.cpu / len(group.guests),
    )


@dataclass(frozen=True, slots=True)
class Results:
    """All kinds, and what belongs to one of them only."""

    kinds: list[Kind]
    merging: Merged | None
    places: list[Place]
    """Where the memory of a guest from the saved system lies."""


async def measure_kinds(setup: Setup, count: int, with_ksm: bool, tell: Tell) -> Results:
    """All kinds, one after the other."""
    kinds: list[Kind] = []
    merging: Merged | None = None
    tell(f"{count} plain guests")
    async with _group(setup, "plain", count, start_one_plain, [setup.image]) as group:
        kinds.append(group.kind)
        if with_ksm:
            tell("the same, until KSM has merged what it can")
            async with merged() as merging:
                kinds.append(await _after(group, merging))
    segments = [item.layer.path for item in setup.prepared.placed if item.layer]
    tell(f"{count} guests booted from the segment")
    async with _group(setup, "segment", count, start_one_cold, segments) as group:
        kinds.append(group.kind)
    tell(f"{count} guests from the saved system")
    files = [*segments, setup.saved.ram]
    async with _group(setup, "saved", count, start_one_saved, files) as group:
        kinds.append(group.kind)
        return Results(kinds, merging, places(group.guests, setup.saved))
