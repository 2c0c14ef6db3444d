"""What an idle clone costs the host beyond the shared copy, by what is mapped.

One clone runs before the figures begin, so that what clones share is in memory already and each
further one adds only what is its own. Not here: guests that have answered requests (kinds.py).
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Running, settled
from benchmarks.kinds import new_name
from benchmarks.merging import merged
from benchmarks.places import Place, places
from benchmarks.setup import Setup
from onecopy.errors import Incompatible
from onecopy.guest.lifecycle.start import start_one
from onecopy.guest.observe.accounts import guest_maps
from onecopy.linux import process
from onecopy.linux.counters import ksm, meminfo, smaps
from onecopy.model import Mergeable

_PAGE_TABLES = ("page_tables", "secondary_page_tables")


@dataclass(frozen=True, slots=True)
class Idle:
    """Clones that have been left alone since their start; bytes per clone."""

    guests: int
    merged: bool
    """KSM has merged what it can, QEMU's own memory included."""
    anonymous: float
    """Pages of the VMM that are in no file, those that KSM shares divided (Pss_Anon)."""
    page_tables: float
    """Of the VMM, and of the guest (KVM's)."""
    kernel: float
    """Stacks of the VMM's threads in the kernel, and KSM's records of its pages."""
    free_taken: float
    """How much less is free on the host, whatever for."""
    places: list[Place]
    cpu: float
    """CPU seconds per second."""

    @property
    def all_in(self) -> float:
        """What one more clone costs, but for what cannot be told apart: small objects of the kernel
        (slab memory), one or two tenths of a MiB."""
        return self.anonymous + self.page_tables + self.kernel


async def measure_idle(
    setup: Setup, count: int, with_ksm: bool, tell: Callable[[str], None]
) -> list[Idle]:
    """``count`` clones, and the same number with KSM over the VMMs' memory."""
    tell(f"{count} idle clones")
    async with _clones(setup, count, Mergeable.RAM) as (guests, before):
        found = [await _figures(setup, guests, before, merged=False)]
    if with_ksm:
        tell(f"{count} idle clones, until KSM has merged what it can")
        async with _clones(setup, count, Mergeable.ALL) as (guests, before), merged():
            found.append(await _figures(setup, guests, before, merged=True))
    return found


async def _figures(
    setup: Setup, guests: Sequence[Running], before: meminfo.MemInfo, *, merged: bool
) -> Idle:
    pids = [guest.maps.pid for guest in guests]
    cpu, now = await settled(pids), meminfo.read()
    return Idle(
        guests=len(guests),
        merged=merged,
        anonymous=statistics.mean(map(_anonymous, pids)),
        page_tables=_grown(before, now, *_PAGE_TABLES) / len(guests),
        kernel=_grown(before, now, "kernel_stacks") / len(guests)
        + statistics.mean(map(_ksm_records, pids)),
        free_taken=-_grown(before, now, "unused") / len(guests),
        places=places(guests, setup.saved),
        cpu=cpu,
    )


def _grown(before: meminfo.MemInfo, now: meminfo.MemInfo, *fields: str) -> int:
    """How many bytes these fields together have grown by."""
    try:
        return sum(getattr(now, field) - getattr(before, field) for field in fields)
    except TypeError:
        raise Incompatible(f"/proc/meminfo does not tell {' and '.join(fields)}") from None


def _ksm_records(pid: int) -> int:
    """Bytes of struct ksm_rmap_item (mm/ksm.c), of 64 bytes, for this process."""
    try:
        text = Path(f"/proc/{pid}/ksm_stat").read_bytes()
    except FileNotFoundError:
        return 0
    return 64 * int(ksm.parse_process(text).get("ksm_rmap_items", 0))


def _anonymous(pid: int) -> int:
    rollup = smaps.read_rollup(pid)
    if not rollup:
        raise Incompatible("this kernel's smaps_rollup has no Pss_Anon")
    return rollup.anonymous


@contextlib.asynccontextmanager
async def _clones(
    setup: Setup, count: int, ksm: Mergeable
) -> AsyncIterator[tuple[list[Running], meminfo.MemInfo]]:
    """``count`` clones at rest, and the host's memory when there was one before them."""
    async with contextlib.AsyncExitStack() as ends:
        first = [await _start(setup, ends, ksm)]
        await settled([guest.maps.pid for guest in first])
        before = meminfo.read()
        yield [await _start(setup, ends, ksm) for _ in range(count)], before


async def _start(setup: Setup, ends: contextlib.AsyncExitStack, ksm: Mergeable) -> Running:
    record = await start_one(setup.host, setup.saved.varied(ksm=ksm), new_name())
    ends.callback(setup.host.end, record)
    (maps,) = guest_maps([record])
    return Running(maps, record.start_seconds, process.cpu_seconds(record.pid))
