"""Writes a guest's RAM and device state, both of the same moment, to files.

During the pause only the VMM's private pages are copied. For a booted guest that is all of the RAM.
For a clone it is the pages that the clone wrote; they go over a copy of its saved RAM, which is
made before the pause. Not here: choosing the guest, and storing the files (save.py).
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
from onecopy.guest.machine import STATE_ROOM
from onecopy.guest.pause import copying, stopped
from onecopy.guest.run_directory import RunDirectory
from onecopy.linux import cow_pages, memfd, sparse
from onecopy.store.disk import file_errors
from onecopy.subprocesses import run
from onecopy.vmm import agent
from onecopy.vmm.monitor import Monitor
from onecopy.vmm.pmem_hotplug import EXEC_PORT, hotplugged_devices
from onecopy.vmm.vmm_limits import writing_at_most


class Source(msgspec.Struct, frozen=True):
    """The RAM to copy."""

    pid: int
    """The VMM's process id."""
    memory: int
    """Bytes of RAM."""
    base: Path | None
    """The file that the VMM maps as RAM; None for anonymous RAM."""


#: Keeps programs frozen during a block (freeze.py); and the same for guests without an agent.
Freezing = contextlib.AbstractAsyncContextManager[Callable[[], None]]
NOT_FROZEN: Freezing = contextlib.nullcontext(lambda: None)


class Snapshot(msgspec.Struct, frozen=True):
    """The written files.

    Attributes:
        ram: The guest's RAM.
        state: The state of its devices.
    """

    ram: Path
    state: Path
    pause: float
    """Seconds for which the guest was paused."""


async def take(
    folder: RunDirectory,
    source: Source,
    work: Path,
    still: Freezing = NOT_FROZEN,
    *,
    last: bool = False,
) -> Snapshot:
    """Pause a guest and write its RAM and device state.

    Args:
        folder: The guest's run directory.
        source: The guest's RAM.
        work: The directory for the files.
        still: Freezes the guest's programs; they are frozen in the files as well.
        last: Leave the guest paused, because it ends now.

    Raises:
        InvalidInput: The guest has devices that were plugged in after its start.
        InUse: A program of `onecopy exec` runs in the guest.
        GuestFailed, NotPermitted: The state or RAM cannot be read.
        InsufficientResources: The disk has too little free space.
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
    # Holes for zero pages save disk space and page cache.
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
    """Raise if the guest has devices that a start from the saved state would not create."""
    later = await hotplugged_devices(monitor)
    if any(not device.startswith(EXEC_PORT) for device in later):
        raise InvalidInput(
            f"{name} has devices that were added after its start (segments, disks, memory), which "
            "a saved system cannot have",
            hint="save a guest without them, and add them to its clones",
        )
    if later:
        raise InUse(
            f"`onecopy exec` runs a program in {name}",
            users=(name,),
            hint="save the guest when the program has ended",
        )


async def _devices(monitor: Monitor, pid: int) -> bytes:
    """Return the state of the devices, as a copy of QEMU's output."""
    # QEMU may keep this file and write to it later, so the content is copied.
    lent = memfd.scratch("onecopy-state")
    try:
        with writing_at_most(pid, STATE_ROOM):
            await monitor.save_devices(lent)
            content = memfd.take(lent, STATE_ROOM)
    finally:
        os.close(lent)
    if not content:
        raise GuestFailed("QEMU wrote no device state")
    return content


def _copy_own(name: str, source: Source, address: int, ram: Path) -> None:
    with copying(name), ram.open("r+b", buffering=0) as out:
        runs = list(cow_pages.own_runs_at(source.pid, address, source.memory))
        cow_pages.copy_out(source.pid, runs, out.fileno())
