"""Hot-plug memory: one virtio-pmem device on the hot-plug bus.

QEMU cannot unplug such a device (hw/virtio/virtio-pmem-pci.c refuses).

Not here: the memory's content (guest/backing.py), what the guest does with it, and disks
(disk_hotplug.py), which share the slots.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from onecopy.errors import GuestFailed, NoSlot, TooLarge
from onecopy.model import format_size
from onecopy.vmm.argv import HOT_BUS, HOT_ROOM, HOT_SLOTS, SERIAL, Backing, MapMode, backend
from onecopy.vmm.open_notify import answer_next

if TYPE_CHECKING:
    from onecopy.vmm.monitor import Monitor

#: The prefix of the ids of ports for programs in the guest (guest/exec.py).
EXEC_PORT = "port."
#: QEMU's messages when the address space for memory devices is full (hw/mem/memory-device.c).
_FULL = ("not enough space", "could not find position")


async def hotplugged_devices(monitor: Monitor) -> set[str]:
    """Return the ids of all hot-plugged devices."""
    # The first is a property, the others are fixed devices.
    return await monitor.members("/machine/peripheral") - {"type", SERIAL, HOT_BUS}


async def used_slots(monitor: Monitor) -> set[int]:
    """Return the slots with a device, whoever plugged it in."""
    names = await monitor.members("/machine/peripheral")
    return {slot for slot in HOT_SLOTS if device_id(slot) in names}


def choose(used: set[int], count: int, guest: str) -> list[int]:
    """Choose free slots.

    Raises:
        NoSlot: fewer than ``count`` are free.
    """
    free = [slot for slot in HOT_SLOTS if slot not in used]
    if len(free) < count:
        raise NoSlot(
            f"{guest} has {len(free)} free slots for segments and disks, but {count} are needed",
            hint="QEMU cannot unplug devices: start a new guest with fewer segments",
        )
    return free[:count]


async def plug(
    monitor: Monitor, slot: int, memory: Backing, *, pid: int, listener: int | None
) -> None:
    """Plug memory into a free slot of a machine.

    Args:
        pid: the VMM's process.
        listener: the VMM's descriptor for open requests, if it makes them (open_notify.py).

    Raises:
        TooLarge: the guest's address space is full; the slot stays free.
        GuestFailed: QEMU refused; the slot stays free.
    """
    name = _memory(slot)
    # Remove what a killed command may have left.
    with contextlib.suppress(GuestFailed):
        await monitor.execute("object-del", {"id": name})
    from onecopy.vmm import vmm_limits  # `exec` needs only this file's names

    vmm_limits.let_map(pid, memory.size, private=memory.mode is MapMode.COPY_ON_WRITE)
    file = os.open(memory.path, _flags(memory.mode) | os.O_CLOEXEC)
    try:
        await _add_memory(monitor, name, memory, file, pid=pid, listener=listener)
    finally:
        os.close(file)
    device = {"driver": "virtio-pmem-pci", "id": device_id(slot), "memdev": name}
    try:
        await monitor.execute("device_add", {**device, "bus": HOT_BUS, "addr": f"{slot:#x}"})
    except BaseException as error:
        with contextlib.suppress(GuestFailed):
            await monitor.execute("object-del", {"id": name})
        if isinstance(error, GuestFailed) and any(words in error.message for words in _FULL):
            raise too_large(memory.size, HOT_ROOM, "all its later segments") from error
        raise


def too_large(size: int, room: int, what: str) -> TooLarge:
    """Build the error for ``size`` bytes where ``room`` bytes exist for ``what``."""
    return TooLarge(
        f"{format_size(size)} do not fit: the guest has {format_size(room)} for {what}",
        hint="start the guest with more --memory, or make the segment smaller",
    )


async def _add_memory(
    monitor: Monitor, name: str, memory: Backing, file: int, *, pid: int, listener: int | None
) -> None:
    if listener is not None and memory.mode is not MapMode.READ_ONLY:
        with answer_next(pid, listener, file):
            await monitor.execute("object-add", backend(name, memory, rom=False))
        return
    async with monitor.lent(file) as path:
        properties: Mapping[str, object] = backend(name, memory, rom=listener is None)
        await monitor.execute("object-add", {**properties, "mem-path": path})


def _flags(mode: MapMode) -> int:
    return os.O_RDWR if mode is MapMode.SHARED else os.O_RDONLY


def device_id(slot: int) -> str:
    """Return QEMU's id of the device in a slot."""
    return f"hot{slot:02x}"


def _memory(slot: int) -> str:
    return f"hot{slot:02x}-memory"
