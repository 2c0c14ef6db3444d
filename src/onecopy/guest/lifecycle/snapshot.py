"""A guest's RAM and the state of its devices at one moment, as files.

Only pages of the VMM's own are copied while the guest stands still: all of a booted guest's RAM,
and of a clone's what it has written, over a copy of the saved RAM that it started from. Not here:
who is saved, and as what (save.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from onecopy.errors import GuestFailed, InUse, InvalidInput
from onecopy.guest.pause import copying, stopped
from onecopy.guest.run_directory import RunDirectory
from onecopy.linux import cow_pages, memfd, sparse
from onecopy.model import MIB
from onecopy.store.disk import file_errors
from onecopy.subprocesses import run
from onecopy.vmm import agent
from onecopy.vmm.monitor import Monitor
from onecopy.vmm.pmem_hotplug import EXEC_PORT, hotplugged_devices
from onecopy.vmm.vmm_limits import writing_at_most

#: Bytes that the state of a machine's devices may take; it takes some 300 KiB.
STATE_ROOM = 16 * MIB


class Source(msgspec.Struct, frozen=True):
    """The RAM that is to be copied."""

    pid: int
    """Of the VMM."""
    memory: int
    """Bytes."""
    base: Path | None
    """The file that it was mapped from; None for anonymous RAM."""


#: What it takes for programs to be frozen (freeze.py); and for those that cannot be.
Freezing = contextlib.AbstractAsyncContextManager[Callable[[], None]]
NOT_FROZEN: Freezing = contextlib.nullcontext(lambda: None)


class Snapshot(msgspec.Struct, frozen=True):
    """What was written."""

    ram: Path
    state: Path
    pause: float
    """Seconds that it stood still."""


async def take(
    folder: RunDirectory,
    source: Source,
    work: Path,
    still: Freezing = NOT_FROZEN,
    *,
    last: bool = False,
) -> Snapshot:
    """Write RAM and state to ``work``; the guest goes on, unless it is the ``last`` it does.

    Meanwhile, and in what is written, its programs are frozen by ``still``. Raises InvalidInput (it
    has devices that came while it ran), InUse (a program runs in it that the host started),
    GuestFailed, NotPermitted, InsufficientResources.
    """
    ram, state = work / "ram", work / "state"
    with file_errors(work):
        await asyncio.to_thread(_copy_base, source, ram)
        async with agent.exclusive(folder.path), still as require_still:
            async with stopped(folder, go_on=not last) as monitor:
                began = time.monotonic()
                require_still()
                await _require_as_started(monitor, folder.name)
                state.write_bytes(await _devices(monitor, source.pid))
                address = await monitor.ram_address()
                await asyncio.to_thread(_copy_own, folder.name, source, address, ram)
            pause = time.monotonic() - began
    # Pages of zeroes need no disk and no page cache.
    await asyncio.to_thread(run, ["fallocate", "--dig-holes", ram])
    return Snapshot(ram, state, pause)


def _copy_base(source: Source, ram: Path) -> None:
    if source.base is None:
        with ram.open("xb") as file:
            file.truncate(source.memory)
        return
    with source.base.open("rb") as base:
        sparse.copy_file(base.fileno(), source.memory, ram)


async def _require_as_started(monitor: Monitor, name: str) -> None:
    """Raise unless the machine has the devices that a start from the saved state gives it."""
    later = await hotplugged_devices(monitor)
    if any(not device.startswith(EXEC_PORT) for device in later):
        raise InvalidInput(
            f"{name} has been given devices since its start (segments, disks, memory), which a "
            "saved system is without",
            hint="start a guest without them and save that; give them to those that start from it",
        )
    if later:
        raise InUse(
            f"a program runs in {name} by `onecopy exec`",
            users=(name,),
            hint="save it when the program has ended",
        )


async def _devices(monitor: Monitor, pid: int) -> bytes:
    """The state of the machine's devices, copied out of what QEMU has written."""
    # QEMU may keep what it was lent, and write to it when the state has been stored.
    lent = memfd.scratch("onecopy-state")
    try:
        with writing_at_most(pid, STATE_ROOM):
            await monitor.save_devices(lent)
            content = memfd.take(lent, STATE_ROOM)
    finally:
        os.close(lent)
    if not content:
        raise GuestFailed("QEMU wrote nothing as the state of its devices")
    return content


def _copy_own(name: str, source: Source, address: int, ram: Path) -> None:
    with copying(name), ram.open("r+b", buffering=0) as out:
        runs = list(cow_pages.own_runs_at(source.pid, address, source.memory))
        cow_pages.copy_out(source.pid, runs, out.fileno())
