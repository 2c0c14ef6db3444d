"""Hot-plug RAM and vCPUs after a saved state was loaded.

The saved hardware stays as it is: a DIMM follows all existing memory, and vCPUs use places that the
machine has from the start (argv.cpu_room).

Not here: what the guest does with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from onecopy.errors import Incompatible
from onecopy.model import MIB, align_up

if TYPE_CHECKING:
    from onecopy.vmm.monitor import Monitor

#: Linux accepts memory in blocks of this size at multiples of it (x86_64: MIN_MEMORY_BLOCK_SIZE in
#: arch/x86/include/asm/sparsemem.h).
MEMORY_BLOCK = 128 * MIB

#: The id of the memory backend of added RAM.
ADDED_BACKEND = "added-memory"
_PLACE = ("socket-id", "die-id", "core-id", "thread-id")


class _Range(msgspec.Struct, frozen=True):
    memaddr: int
    size: int


class _MemoryDevice(msgspec.Struct, frozen=True):
    data: _Range


class _Cpu(msgspec.Struct, frozen=True):
    """A place for a vCPU; it is occupied if it has a path."""

    type: str
    props: dict[str, int]
    path: str = msgspec.field(name="qom-path", default="")


async def add_memory(monitor: Monitor, size: int) -> int:
    """Plug in ``size`` bytes, a multiple of MEMORY_BLOCK; return their address in the guest."""
    devices = await monitor.ask("query-memory-devices", list[_MemoryDevice])
    # QEMU would choose the address right after a segment, wherever that ends.
    end = max((each.data.memaddr + each.data.size for each in devices), default=0)
    address = align_up(end, MEMORY_BLOCK)
    memory = {"qom-type": "memory-backend-ram", "id": ADDED_BACKEND, "size": size}
    await monitor.execute("object-add", memory)
    dimm = {"driver": "pc-dimm", "id": "added", "memdev": ADDED_BACKEND, "addr": address}
    await monitor.execute("device_add", dimm)
    return address


async def add_cpus(monitor: Monitor, count: int) -> None:
    """Plug in vCPUs.

    Raises:
        Incompatible: the machine has fewer than ``count`` free places.
    """
    places = await monitor.ask("query-hotpluggable-cpus", list[_Cpu])
    free = sorted((each for each in places if not each.path), key=_place)
    if len(free) < count:
        raise Incompatible(
            f"the machine has {len(free)} free places for vCPUs, but {count} are needed",
            hint="save the system again with more --cpus",
        )
    for number, place in enumerate(free[:count]):
        cpu = {"driver": place.type, "id": f"added-cpu{number}", **place.props}
        await monitor.execute("device_add", cpu)


def _place(cpu: _Cpu) -> tuple[int, ...]:
    return tuple(cpu.props.get(name, 0) for name in _PLACE)
