"""Checks the figures: the parts of a report add up, and the savings that `advise` states hold.

Not here: what each kind of guest costs (kinds.py).
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.figures import Running, evict, settled, taken
from benchmarks.kinds import Starter, start_one_cold, start_one_plain, start_one_saved
from benchmarks.merging import merged
from benchmarks.plain import disk_module
from benchmarks.setup import Setup
from onecopy.guest.observe.accounts import server_maps
from onecopy.linux import process_memory
from onecopy.linux.counters import ksm, meminfo
from onecopy.model import MIB, PAGE_SIZE
from onecopy.sharing import report
from onecopy.sharing.cross_check import Check, check, look
from onecopy.sharing.file_pages import Image
from onecopy.sharing.survey import Sources, Survey, survey
from onecopy.vmm import fork_registry

Tell = Callable[[str], None]

#: Guests for `advise` that share no RAM: how many, and MiB of each.
_MANY, _LARGE = 100, 256
#: A separate process, so that its memory can be measured.
_SYNTHETIC = """
import resource, sys
import numpy as np
from onecopy.sharing.advice import advise
from onecopy.sharing.ram_scan import Scan
guests, pages = int(sys.argv[1]), int(sys.argv[2])
generator = np.random.default_rng(1)
common = generator.integers(1, 1 << 63, pages // 2, dtype=np.uint64)
scans = []
for number in range(guests):
    own = generator.integers(1, 1 << 63, pages - len(common), dtype=np.uint64)
    hashes = generator.permutation(np.concatenate((common, own)))
    every = np.arange(pages), hashes, np.ones(pages, np.bool_)
    scans.append(Scan(str(number), number, pages * 4096, *every, 0, 0, 0, 0))
found = advise(scans)
assert found.possible == (guests - 1) * len(common) * 4096, found
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
"""


@dataclass(frozen=True, slots=True)
class Truth:
    """Bytes and seconds."""

    clones: int
    clones_check: Check
    """Idle clones of the saved system."""
    plain: int
    plain_check: Check
    """Idle plain guests."""
    own: int
    """Bytes of the plain guests' memory that were read."""
    read_seconds: float
    """CPU time for reading and hashing it."""
    copy_seconds: float
    """CPU time for copying as much within memory."""
    peek_seconds: float
    """CPU time for copying as much out of a process (process_vm_readv(2)), without hashing."""
    claims: dict[str, int]
    """Savings of each way, as `advise` states for the plain guests."""
    came_true: dict[str, int]
    """Savings when the same guests ran that way: host memory with page cache; for KSM the pages
    that it freed."""
    many_memory: int
    """Peak memory of `advise` for 100 synthetic guests of 256 MiB with half in common."""
    many_seconds: float


async def measure_truth(setup: Setup, clones: int, plain: int, tell: Tell) -> Truth:
    """Measure ``clones`` of the saved system, then ``plain`` guests in every way."""
    tell(f"{clones} clones, and the check of their report")
    async with _guests(setup, clones, start_one_saved) as rested:
        clones_check = rested.check
    tell(f"{plain} plain guests, and advice for them")
    async with _guests(setup, plain, start_one_plain) as plainly:
        root = [Image("root", setup.image)]
        found = survey([guest.maps for guest in plainly.guests], Sources(root_images=root))
        before = ksm.read()
        # A stopped KSM still counts pages of guests that have ended.
        already = _saved(before) if before and before.run else 0
        tell("the same, until KSM has merged what it can")
        async with merged():
            saved = {"ksm": _saved(ksm.read()) - already}
    for name, start in (("root", start_one_cold), ("saved", start_one_saved)):
        tell(f"{plain} guests as advised: {name}")
        async with _guests(setup, plain, start) as rested:
            saved[name] = plainly.memory - rested.memory
    tell(f"advice for {_MANY} guests of {_LARGE} MiB")
    memory, seconds = _synthetic()
    return Truth(
        clones=clones,
        clones_check=clones_check,
        plain=plain,
        plain_check=plainly.check,
        own=found.advice.own,
        read_seconds=found.cpu_seconds,
        copy_seconds=_copy(found.advice.own),
        peek_seconds=_peek(found.advice.own),
        claims=_claims(found),
        came_true=saved,
        many_memory=memory,
        many_seconds=seconds,
    )


@dataclass(frozen=True, slots=True)
class _Rested:
    """Guests idle."""

    guests: Sequence[Running]
    check: Check
    memory: int
    """Return the decrease of the host's MemFree in bytes, page cache of disks included."""


@contextlib.asynccontextmanager
async def _guests(setup: Setup, count: int, start: Starter) -> AsyncIterator[_Rested]:
    """Start guests one after another, with none of their files in the page cache before."""
    disk_module(setup)
    files = [item.layer.path for item in setup.prepared.placed if item.layer]
    evict([*files, setup.saved.ram, setup.image])
    before = look(fork_registry.pids())
    async with contextlib.AsyncExitStack() as ends:
        guests: Sequence[Running] = [await start(setup, ends) for _ in range(count)]
        await settled([guest.maps.pid for guest in guests])
        found = report.collect([guest.maps for guest in guests], servers=server_maps())
        told = check(before, found)
        yield _Rested(guests, told, taken(before.memory.unused, meminfo.read().unused))


def _saved(told: ksm.Ksm | None) -> int:
    if told is None or told.pages_sharing is None:
        raise RuntimeError("this kernel has no KSM")
    return told.pages_sharing * PAGE_SIZE


def _claims(found: Survey) -> dict[str, int]:
    return {way.name: way.saves for way in found.advice.ways}


def _copy(size: int) -> float:
    """Return the CPU seconds for copying ``size`` bytes, with both sides in memory."""
    chunk = 256 * MIB
    source, target = np.ones(chunk, np.uint8), np.zeros(chunk, np.uint8)
    began = time.process_time()
    for _ in range(4):
        np.copyto(target, source)
    return (time.process_time() - began) / (4 * chunk) * size


def _peek(size: int) -> float:
    """Return the CPU seconds for copying a process's memory as scans do: 2 MiB at once."""
    pages, at_once = 256 * MIB // PAGE_SIZE, 512
    source, into = np.ones(pages * PAGE_SIZE, np.uint8), np.empty((at_once, PAGE_SIZE), np.uint8)
    addresses = source.ctypes.data + np.arange(pages, dtype=np.uint64) * np.uint64(PAGE_SIZE)
    began = time.process_time()
    for at in range(0, pages, at_once):
        process_memory.read(os.getpid(), addresses[at : at + at_once], into)
    return (time.process_time() - began) / source.nbytes * size


def _synthetic() -> tuple[int, float]:
    argv = [sys.executable, "-c", _SYNTHETIC, str(_MANY), str(_LARGE * MIB // PAGE_SIZE)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return int(done.stdout), after.ru_utime - before.ru_utime
