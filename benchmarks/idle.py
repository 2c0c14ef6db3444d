"""Measures the host memory of an idle clone beyond the shared copy, by kind of mapping.

One clone runs before the measurement, so that shared memory is present and each further clone adds
only its own. Not here: guests that have answered requests (kinds.py).
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
    """The figures of idle clones; bytes per clone."""

    guests: int
    merged: bool
    """Whether KSM has merged all equal pages, QEMU's own memory included."""
    anonymous: float
    """Anonymous pages of the VMM; pages that KSM shares are divided (Pss_Anon)."""
    page_tables: float
    """Page tables of the VMM, and KVM's of the guest."""
    kernel: float
    """Kernel stacks of the VMM's threads, and KSM's records of its pages."""
    free_taken: float
    """Decrease of the host's MemFree."""
    places: list[Place]
    cpu: float
    """CPU seconds per second."""

    @property
    def all_in(self) -> float:
        """The memory of one more clone, without kernel slab memory (0.1 to 0.2 MiB)."""
        return self.anonymous + self.page_tables + self.kernel


async def measure_idle(
    setup: Setup, count: int, with_ksm: bool, tell: Callable[[str], None]
) -> list[Idle]:
    """Measure ``count`` clones, and as many with KSM over the VMMs' memory."""
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
    """Return the total growth of these fields in bytes."""
    try:
        return sum(getattr(now, field) - getattr(before, field) for field in fields)
    except TypeError:
        raise Incompatible(f"/proc/meminfo lacks {' and '.join(fields)}") from None


def _ksm_records(pid: int) -> int:
    """Return the bytes of struct ksm_rmap_item (mm/ksm.c, 64 bytes each) for a process."""
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
    """Yield ``count`` idle clones, and the host's memory when one clone ran before them."""
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
