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

#: Bytes of a thread's stack in the kernel (x86_64: THREAD_SIZE), and of struct ksm_rmap_item.
_STACK, _RECORD = 16 << 10, 64
#: Single starts of each kind.
_STARTS = 5


@dataclass(frozen=True, slots=True)
class Idle:
    """The figures of idle clones; bytes per clone."""

    guests: int
    forked: bool
    """Whether a fork server started their VMMs, or exec did."""
    ksm: Mergeable
    """What KSM has merged, as far as pages are equal."""
    start: Spread
    """Seconds until a clone was ready, with KSM off; starts of all kinds in turn."""
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
    ways = (True, False) if server.path else (False,)
    tell(f"{_STARTS} starts of each kind")
    starts = await _starts(setup, [(way, kind) for way in ways for kind in _started(with_ksm)])
    found = []
    for forked in ways:
        way = "forked" if forked else "started by exec"
        tell(f"{count} idle clones, {way}")
        async with _clones(setup, count, Mergeable.RAM, forked) as clones:
            start = starts[forked, Mergeable.RAM]
            found.append(await _figures(clones, Mergeable.NONE, start, None))
            if with_ksm:
                tell("the same, until KSM has merged their RAM")
                async with merged(clones.pids) as merging:
                    found.append(await _figures(clones, Mergeable.RAM, start, merging))
        if with_ksm:
            tell(f"{count} idle clones, {way}, until KSM has merged all it can")
            start = starts[forked, Mergeable.ALL]
            async with (
                _clones(setup, count, Mergeable.ALL, forked) as clones,
                merged(clones.pids) as merging,
            ):
                found.append(await _figures(clones, Mergeable.ALL, start, merging))
    return found


def _started(with_ksm: bool) -> list[Mergeable]:
    return [Mergeable.RAM, *([Mergeable.ALL] if with_ksm else [])]


async def _starts(
    setup: Setup, kinds: Sequence[tuple[bool, Mergeable]]
) -> dict[tuple[bool, Mergeable], Spread]:
    """Start single clones of all kinds in turn, after one of each that starts what they share."""
    seconds: dict[tuple[bool, Mergeable], list[float]] = {kind: [] for kind in kinds}
    for _ in range(_STARTS + 1):
        for forked, merge in kinds:
            async with contextlib.AsyncExitStack() as ends:
                guest = await _start(setup, ends, merge, forked)
                seconds[forked, merge].append(guest.seconds)
    return {kind: Spread.of(values[1:]) for kind, values in seconds.items()}


async def _figures(clones: _Clones, kind: Mergeable, start: Spread, merging: Merged | None) -> Idle:
    guests, before, pids = clones.guests, clones.before, clones.pids
    cpu, now = await settled(pids), meminfo.read()
    return Idle(
        guests=len(guests),
        forked=clones.forked,
        ksm=kind,
        start=start,
        anonymous=statistics.mean(map(_anonymous, pids)),
        page_tables=statistics.mean(process.page_table_bytes(pid) or 0 for pid in pids)
        + _grown(before.secondary_page_tables, now.secondary_page_tables) / len(guests),
        kernel=statistics.mean(map(_kernel, pids)),
        free_taken=_grown(now.unused, before.unused) / len(guests),
        places=places(guests, clones.setup.saved),
        cpu=cpu,
        profit=statistics.mean(ksm.read_process(pid).profit or 0 for pid in pids),
        merging=merging,
    )


def _grown(before: int | None, now: int | None) -> int:
    """Return the growth of a field of /proc/meminfo in bytes; older kernels lack some."""
    return (now or 0) - (before or 0)


def _kernel(pid: int) -> int:
    """Return the bytes of a process's kernel stacks and of KSM's records (mm/ksm.c)."""
    stacks = _STACK * len(list(Path(f"/proc/{pid}/task").iterdir()))
    try:
        text = Path(f"/proc/{pid}/ksm_stat").read_bytes()
    except FileNotFoundError:
        return stacks
    return stacks + _RECORD * int(ksm.parse_process(text).get("ksm_rmap_items", 0))


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
