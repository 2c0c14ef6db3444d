"""Measures the host memory of an idle clone beyond the shared copy, by kind of mapping.

VMMs start in both ways, from a fork server and by exec. KSM merges nothing, guest RAM, or QEMU's
own memory, too. One clone runs before the measurement, so that shared memory is present and each
further clone adds only its own.

Not here: guests that have answered requests (kinds.py).
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Running, Spread, settled
from benchmarks.kinds import new_name
from benchmarks.merging import Merged, merged
from benchmarks.places import Place, places
from benchmarks.setup import Setup
from onecopy.errors import Incompatible
from onecopy.guest.lifecycle.start import start_one
from onecopy.guest.observe.accounts import guest_maps
from onecopy.linux import process
from onecopy.linux.counters import ksm, meminfo, smaps
from onecopy.model import Mergeable
from onecopy.vmm import fork_probe

_PAGE_TABLES = ("page_tables", "secondary_page_tables")


@dataclass(frozen=True, slots=True)
class Idle:
    """The figures of idle clones; bytes per clone."""

    guests: int
    forked: bool
    """Whether a fork server started their VMMs, or exec did."""
    ksm: Mergeable
    """What KSM has merged, as far as pages are equal."""
    start: Spread
    """Seconds until a clone was ready. KSM was off then."""
    anonymous: float
    """Anonymous pages of the VMM; pages that others share are divided (Pss_Anon)."""
    page_tables: float
    """Page tables of the VMM, and KVM's of the guest."""
    kernel: float
    """Kernel stacks of the VMM's threads, and KSM's records of its pages."""
    free_taken: float
    """Decrease of the host's MemFree."""
    places: list[Place]
    cpu: float
    """CPU seconds per second."""
    profit: float
    """What KSM saves, less its records, as the kernel counts it for each VMM."""
    merging: Merged | None
    """What KSM did and cost until it merged nothing more; all clones and one more."""

    @property
    def all_in(self) -> float:
        """The memory of one more clone, without kernel slab memory (0.1 to 0.2 MiB)."""
        return self.anonymous + self.page_tables + self.kernel


@dataclass(frozen=True, slots=True)
class _Clones:
    """Idle clones of one kind, and the host's memory when one clone ran before them."""

    setup: Setup
    forked: bool
    guests: Sequence[Running]
    before: meminfo.MemInfo

    @property
    def pids(self) -> list[int]:
        return [guest.maps.pid for guest in self.guests]


async def measure_idle(
    setup: Setup, count: int, with_ksm: bool, tell: Callable[[str], None]
) -> list[Idle]:
    """Measure ``count`` clones in each way, and with KSM over RAM and over the VMMs' memory."""
    server = fork_probe.find(setup.host.qemu.binary, setup.host.store.cache)
    if not server.path:
        tell(f"no VMM is forked: {server.why_not}")
    found = []
    for forked in (True, False) if server.path else (False,):
        way = "forked" if forked else "started by exec"
        tell(f"{count} idle clones, {way}")
        async with _clones(setup, count, Mergeable.RAM, forked) as clones:
            found.append(await _figures(clones, Mergeable.NONE, None))
            if with_ksm:
                tell("the same, until KSM has merged their RAM")
                async with merged(clones.pids) as merging:
                    found.append(await _figures(clones, Mergeable.RAM, merging))
        if with_ksm:
            tell(f"{count} idle clones, {way}, until KSM has merged all it can")
            async with (
                _clones(setup, count, Mergeable.ALL, forked) as clones,
                merged(clones.pids) as merging,
            ):
                found.append(await _figures(clones, Mergeable.ALL, merging))
    return found


async def _figures(clones: _Clones, kind: Mergeable, merging: Merged | None) -> Idle:
    guests, before, pids = clones.guests, clones.before, clones.pids
    cpu, now = await settled(pids), meminfo.read()
    return Idle(
        guests=len(guests),
        forked=clones.forked,
        ksm=kind,
        start=Spread.of(guest.seconds for guest in guests),
        anonymous=statistics.mean(map(_anonymous, pids)),
        page_tables=_grown(before, now, *_PAGE_TABLES) / len(guests),
        kernel=_grown(before, now, "kernel_stacks") / len(guests)
        + statistics.mean(map(_ksm_records, pids)),
        free_taken=-_grown(before, now, "unused") / len(guests),
        places=places(guests, clones.setup.saved),
        cpu=cpu,
        profit=statistics.mean(ksm.read_process(pid).profit or 0 for pid in pids),
        merging=merging,
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
async def _clones(setup: Setup, count: int, ksm: Mergeable, forked: bool) -> AsyncIterator[_Clones]:
    """Yield ``count`` idle clones; one more runs before them."""
    async with contextlib.AsyncExitStack() as ends:
        first = [await _start(setup, ends, ksm, forked)]
        await settled([guest.maps.pid for guest in first])
        before = meminfo.read()
        guests = [await _start(setup, ends, ksm, forked) for _ in range(count)]
        yield _Clones(setup, forked, guests, before)


async def _start(
    setup: Setup, ends: contextlib.AsyncExitStack, ksm: Mergeable, forked: bool
) -> Running:
    plan = setup.saved.varied(ksm=ksm, isolated_vmm=not forked)
    record = await start_one(setup.host, plan, new_name())
    ends.callback(setup.host.end, record)
    if record.forked != forked:
        raise Incompatible(f"a VMM was not forked: {record.why_exec}")
    (maps,) = guest_maps([record])
    return Running(maps, record.start_seconds, process.cpu_seconds(record.pid))
