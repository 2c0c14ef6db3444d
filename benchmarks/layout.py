"""What a guest gains if large files lie at multiples of 2 MiB in the image of their segment.

DAX maps 2 MiB at once where the place in the image, the place in the file and the address agree.
The same tree is built twice, as it is and with its large ELF files aligned, and programs of it run
in guests: with it as the root, which guests see through an overlay, and as a segment that is
mounted as it is. Not here: that an aligned file is mapped so (tests/vm/test_large_pages.py).
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Spread, evict
from benchmarks.kinds import new_name
from benchmarks.setup import Setup, resource
from onecopy.errors import GuestFailed
from onecopy.guest.exec import run_captured
from onecopy.guest.lifecycle.launchplan import BootSpec, LaunchPlan
from onecopy.guest.lifecycle.start import plan_launch, start_one
from onecopy.guest.run_directory import GuestRecord
from onecopy.images.build import build_segment
from onecopy.images.fs_image import make_image
from onecopy.images.source import open_source
from onecopy.images.tree import walk
from onecopy.linux import process
from onecopy.linux.counters.residency import resident_bytes
from onecopy.model import HUGE_PAGE_SIZE, MIB, PAGE_SIZE, Reference

#: Removed at the end.
TREES = {
    "as it is": Reference("bench-layout", "plain"),
    "aligned": Reference("bench-layout", "aligned"),
}
_SOURCE, _PACKAGES = "debian:bookworm", ["python3", "nodejs", "clang"]
#: Files below this have hardly a whole 2 MiB that is mapped in one piece.
LARGE = 4 * MIB
#: Further starts of each program in a guest.
AGAIN = 2
_AT = "/data"
_PROC = f"[ -e {_AT}/proc/self ] || mount -t proc proc {_AT}/proc;"
_TRACE = "/sys/kernel/tracing"
_C = "".join(
    f"int f{n}(int *a, int b) {{ int s = {n}; for (int i = 0; i < b; i++) s += a[i] * {n}; "
    "return s; }\n"
    for n in range(8)
)
PROGRAMS: dict[str, tuple[list[str], str]] = {
    "python3": (["python3", "-c", "import http.server, ssl"], ""),
    "node": (["node", "-e", "require('http'); require('crypto')"], ""),
    "clang -O2": (["clang", "-O2", "-S", "-o", "/dev/null", "-x", "c", "-"], _C),
}
_MEMORY = 768 * MIB
#: Bytes resident at the end, and the figures of each program.
_Run = tuple[int, dict[str, dict[str, float]]]
_COUNTED = ("faults", "seconds", "cpu", "again", "large", "refused", "small")


@dataclass(frozen=True, slots=True)
class Program:
    """One program in guests of one kind."""

    faults: Spread
    """Minor page faults of its first start."""
    seconds: Spread
    """Of its first start."""
    cpu: Spread
    """CPU seconds of the VMM for it."""
    again: Spread
    """CPU seconds of the VMM for a further start in the same guest."""
    large: Spread
    """Faults of one start that mapped 2 MiB of a file."""
    refused: Spread
    """Faults of one start where 2 MiB were tried, and places did not agree."""
    small: Spread
    """Faults of one start that mapped 4 KiB of a file."""
    tables: Spread
    """Bytes of page tables, at most."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Guests in which the tree has one layout and one place."""

    layout: str
    place: str
    """``root`` or ``segment``."""
    image: int
    """Bytes of the image."""
    resident: Spread
    """Bytes of the image in the host's memory after all programs ran, none of them before."""
    programs: dict[str, Program]


async def measure_layouts(setup: Setup, count: int, tell: Callable[[str], None]) -> list[Layout]:
    """``count`` guests of each kind."""
    tell("two layouts of one tree")
    try:
        _build(setup, tell)
        return await compare(setup, count, tell)
    finally:
        for ref in TREES.values():
            if setup.host.store.find(ref, "segment"):
                setup.host.store.remove(ref)


async def compare(setup: Setup, count: int, tell: Callable[[str], None]) -> list[Layout]:
    """The same, of the segments that are there."""
    runs: dict[tuple[str, str], list[_Run]] = {}
    for number in range(count):
        for place in ("root", "segment"):
            tell(f"guests with two layouts, {number + 1} of {count}: {place}")
            # At once, so that a busy moment of the host hits both.
            async with asyncio.TaskGroup() as group:
                tasks = {
                    layout: group.create_task(_guest(setup, layout, place)) for layout in TREES
                }
            for layout, task in tasks.items():
                runs.setdefault((layout, place), []).append(task.result())
    return [
        Layout(
            layout=layout,
            place=place,
            image=_image(setup, layout).stat().st_size,
            resident=Spread.of(resident for resident, _ in found),
            programs={name: _program([run[name] for _, run in found]) for name in PROGRAMS},
        )
        for (layout, place), found in runs.items()
    ]


def _program(runs: Sequence[dict[str, float]]) -> Program:
    return Program(
        **{key: Spread.of(run[key] for run in runs) for key in _COUNTED},
        tables=Spread.of(run["tables"] * 1024 for run in runs),
    )


def _image(setup: Setup, layout: str) -> Path:
    return setup.host.store.resolve(TREES[layout], "segment").layer("image").path


def _prepared(setup: Setup, ref: Reference, place: str) -> LaunchPlan:
    own = setup.spec
    is_root = place == "root"
    spec = BootSpec(
        root=ref if is_root else own.root,
        segments=() if is_root else ((ref, _AT),),
        memory=_MEMORY,
        network=False,
        accel=own.accel,
    )
    return plan_launch(setup.host, spec)


async def _guest(setup: Setup, layout: str, place: str) -> _Run:
    """One fresh guest, of whose image nothing is in the host's memory before."""
    prepared, image = _prepared(setup, TREES[layout], place), _image(setup, layout)
    evict([image])
    record = await start_one(setup.host, prepared, new_name())
    try:
        told = {name: await _figures(setup, record, place, name) for name in PROGRAMS}
        return resident_bytes(image) or 0, told
    finally:
        setup.host.end(record)


async def _figures(setup: Setup, record: GuestRecord, place: str, program: str) -> dict[str, float]:
    first = await _probe(setup, record, place, program, "1")
    none = await _probe(setup, record, place, program, "0")
    more = await _probe(setup, record, place, program, str(AGAIN))
    traced = await _probe(setup, record, place, program, "1", "traced")
    # Without what the probe itself takes.
    again = (more["cpu"] - none["cpu"]) / AGAIN
    return {**first, **traced, "again": again, "cpu": first["cpu"] - none["cpu"]}


async def _probe(
    setup: Setup, record: GuestRecord, place: str, program: str, *options: str
) -> dict[str, float]:
    """What the probe prints, and CPU seconds of the VMM meanwhile."""
    see, mounts = ("/", "") if place == "root" else (_AT, _PROC)
    script = f'[ -e {_TRACE}/trace ] || mount -t tracefs tracefs {_TRACE}; {mounts} python3 -c "$@"'
    probe = ["probe", resource("layoutprobe.py"), see, json.dumps(PROGRAMS[program]), *options]
    before = process.cpu_seconds(record.pid)
    argv = ["sh", "-c", script, *probe]
    done = await run_captured(setup.host.run / record.name, argv, timeout=300)
    if done.exit_code:
        raise GuestFailed(f"the probe failed in {record.name}: {done.stderr.decode()}")
    told: dict[str, float] = json.loads(done.stdout)
    return {**told, "cpu": process.cpu_seconds(record.pid) - before}


def _build(setup: Setup, tell: Callable[[str], None]) -> None:
    """Both segments."""
    tree = setup.work / "tree"
    tree.mkdir()
    tree = open_source(_SOURCE, _PACKAGES).unpack(tree, tell)
    build_segment(setup.host.store, TREES["as it is"], f"dir:{tree}", progress=tell)
    large = list(large_files(tree))
    pads = {path: path.with_name(_before(path.name)) for path in large}
    for pad in pads.values():
        pad.write_bytes(bytes(PAGE_SIZE))
    scratch = setup.work / "image"
    make_image(tree, scratch, "erofs")
    shift = 0
    for path, begin in sorted(_begins(scratch, large).items(), key=lambda item: item[1]):
        room = -(begin + shift) % HUGE_PAGE_SIZE
        shift += room
        os.truncate(pads[path], PAGE_SIZE + room)
    scratch.unlink()
    segment = build_segment(setup.host.store, TREES["aligned"], f"dir:{tree}", progress=tell)
    begins = _begins(segment.layer("image").path, large)
    wrong = [path for path, begin in begins.items() if begin % HUGE_PAGE_SIZE]
    if wrong:
        raise RuntimeError(f"not aligned: {wrong}")


def large_files(tree: Path) -> Iterator[Path]:
    """The ELF files of at least LARGE bytes; of those with several names the first."""
    seen = set()
    for path, status in walk(tree):
        if not stat.S_ISREG(status.st_mode) or status.st_size < LARGE or status.st_ino in seen:
            continue
        with path.open("rb") as file:
            if file.read(4) == b"\x7fELF":
                seen.add(status.st_ino)
                yield path


def _before(name: str) -> str:
    """A name that sorts before ``name``, with hardly anything in between."""
    return name[:-1] + "!"


def _begins(image: Path, files: Sequence[Path]) -> dict[Path, int]:
    """Where in ``image`` the content of each file begins."""
    begins = {}
    with image.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as data:
        for path in files:
            with path.open("rb") as file:
                begins[path] = data.find(file.read(16 * PAGE_SIZE))
    return begins
