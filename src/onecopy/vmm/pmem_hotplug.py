"""Memory that a running machine gets: one virtio-pmem device behind the bridge for hot-plug.

QEMU cannot take such a device away again (hw/virtio/virtio-pmem-pci.c refuses to). Not here: what
the memory is made of (guest/backing.py), what the guest does with it, and disks (disk_hotplug.py),
which share the slots.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

from onecopy.errors import GuestFailed, NoSlot, TooLarge
from onecopy.model import format_size
from onecopy.vmm import vmm_limits
from onecopy.vmm.argv import HOT_BUS, HOT_ROOM, HOT_SLOTS, SERIAL, MapMode, Slot, backend
from onecopy.vmm.monitor import Monitor
from onecopy.vmm.open_notify import answering

#: How the ids of the ports begin that a program in the guest has (guest/exec.py).
EXEC_PORT = "port."
#: QEMU's words when the room for memory devices is full (hw/mem/memory-device.c).
_FULL = ("not enough space", "could not find position")


async def later_devices(monitor: Monitor) -> set[str]:
    """The ids of all devices that came since the machine was started."""
    # The one property that is no device.
    return await monitor.members("/machine/peripheral") - {"type", SERIAL, HOT_BUS}


async def used_slots(monitor: Monitor) -> set[int]:
    """The slots that have a device, whoever plugged it in."""
    names = await monitor.members("/machine/peripheral")
    return {slot for slot in HOT_SLOTS if device_id(slot) in names}


def choose(used: set[int], count: int, guest: str) -> list[int]:
    """``count`` slots that are free; raise NoSlot."""
    free = [slot for slot in HOT_SLOTS if slot not in used]
    if len(free) < count:
        raise NoSlot(
            f"{guest} has {len(free)} slots left for segments and disks, and {count} are needed",
            hint="QEMU cannot take devices away: start a new guest, with fewer segments",
        )
    return free[:count]


async def plug(
    monitor: Monitor, slot: int, memory: Slot, *, pid: int, listener: int | None
) -> None:
    """Plug ``memory`` into a free ``slot`` of the machine of VMM ``pid``.

    ``listener`` is where that VMM asks for files, if it does (open_notify.py). Raises TooLarge, or
    GuestFailed; then the slot is as it was.
    """
    name = _memory(slot)
    # What a killed command left half done.
    with contextlib.suppress(GuestFailed):
        await monitor.execute("object-del", {"id": name})
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
    """The error for a range of ``size`` bytes where there are ``room`` for ``what``."""
    return TooLarge(
        f"{format_size(size)} do not fit: the guest has {format_size(room)} for {what}",
        hint="start the guest with more --memory, or make the segment smaller",
    )


async def _add_memory(
    monitor: Monitor, name: str, memory: Slot, file: int, *, pid: int, listener: int | None
) -> None:
    if listener is not None and memory.mode is not MapMode.READ_ONLY:
        with answering(pid, listener, file):
            await monitor.execute("object-add", backend(name, memory, rom=False))
        return
    async with monitor.lent(file) as path:
        properties: Mapping[str, object] = backend(name, memory, rom=listener is None)
        await monitor.execute("object-add", {**properties, "mem-path": path})


def _flags(mode: MapMode) -> int:
    return os.O_RDWR if mode is MapMode.SHARED else os.O_RDONLY


def device_id(slot: int) -> str:
    """What the device in a slot is called in QEMU."""
    return f"hot{slot:02x}"


def _memory(slot: int) -> str:
    return f"hot{slot:02x}-memory"
