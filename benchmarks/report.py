"""Formats all results of a run as JSON values and as Markdown.

Not here: the meaning of the figures (docs/performance.md).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.batches import Batches
from benchmarks.figures import Kind, Spread
from benchmarks.firstguest import WAYS, FirstGuests
from benchmarks.firststart import FirstStart
from benchmarks.idle import Idle
from benchmarks.kinds import Results
from benchmarks.layout import PROGRAMS, Layout
from benchmarks.many import Many
from benchmarks.merging import Merged
from benchmarks.places import Place
from benchmarks.setup import Setup
from benchmarks.starts import MOMENTS, Starts
from benchmarks.translated import Room
from benchmarks.truth import Truth
from onecopy.linux import prefetch
from onecopy.linux.counters import meminfo
from onecopy.model import Mergeable, format_size
from onecopy.sharing.cross_check import LINES

_NAMES = {
    "plain": "plain",
    "ksm": "plain + KSM",
    "segment": "segment, booted",
    "saved": "saved system",
}
_MERGED = {Mergeable.NONE: "no KSM", Mergeable.RAM: "KSM: RAM", Mergeable.ALL: "KSM: all"}


@dataclass(slots=True)
class Report:
    """The results of a run."""

    machine: dict[str, str]
    starts: Starts | None = None
    batches: Batches | None = None
    programs: dict[str, FirstStart] | None = None
    first: FirstGuests | None = None
    kinds: Results | None = None
    idle: list[Idle] | None = None
    layouts: list[Layout] | None = None
    many: Many | None = None
    truth: Truth | None = None
    translated: list[Room] | None = None

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values in seconds and bytes; each spread with all its values."""
        return {"schema": 2, **asdict(self)}

    def to_markdown(self) -> str:
        """Format the tables, each with a heading."""
        machine = [[key, value] for key, value in self.machine.items()]
        parts = ["### The machine\n\n" + table(["", ""], machine)]
        if self.kinds:
            number = self.kinds.kinds[0].guests
            tables = _kinds(self.kinds.kinds, self.kinds.merging)
            parts.append(f"### {number} guests of each kind\n\n{tables}")
            parts.append(
                "### Where the memory of a saved system's guest lies\n\n"
                + _places(self.kinds.places)
            )
        if self.starts:
            parts.append("### One start\n\n" + _starts(self.starts))
            parts.append("### The phases of one start\n\n" + _phases(self.starts))
        if self.batches:
            parts.append("### Many at once\n\n" + _batches(self.batches))
        if self.programs:
            parts.append(
                "### First start of a program in a guest\n\n" + _first_starts(self.programs)
            )
        if self.first:
            parts.append("### The first guest\n\n" + _first_guests(self.first))
        if self.idle:
            parts.append("### An idle clone, beyond the shared copy\n\n" + _idle(self.idle))
        parts += self._further()
        return "\n\n".join(parts) + "\n"

    def _further(self) -> list[str]:
        parts = []
        if self.layouts:
            parts.append("### Large files, as they are and aligned\n\n" + _layouts(self.layouts))
        if self.many:
            parts.append("### Many clones at once\n\n" + _many(self.many))
        if self.truth:
            parts.append("### Whether the figures are true\n\n" + _truth(self.truth))
        if self.translated:
            parts.append("### Room for translated code (TCG)\n\n" + _rooms(self.translated))
        return parts


def machine_facts(setup: Setup, runs: str = "Debian with Python") -> dict[str, str]:
    """Describe the host and the versions; ``runs`` is the guests' software."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = [
        line.partition(":")[2].strip() for line in cpuinfo.splitlines() if "model name" in line
    ]
    accel, hardware = setup.prepared.accel, setup.prepared.hardware
    return {
        "processor": f"{model[0] if model else platform.machine()}, {os.cpu_count()} cores",
        "memory": f"{(meminfo.read().total or 0) / 2**30:.0f} GiB",
        "host kernel": platform.release(),
        "read ahead of the store's disk": _size(prefetch.read_ahead(setup.host.store.root)),
        "QEMU": f"{setup.host.qemu.version}, {hardware.machine}, CPU {hardware.cpu}",
        "accelerator": f"{accel.name} ({accel.reason})",
        "guest": f"{hardware.memory / 2**20:.0f} MiB, {hardware.cpus} CPU, "
        f"Linux {setup.saved.config.kernel}, {runs}",
        "load average at the end": f"{os.getloadavg()[1]:.1f} (5 minutes)",
        "saving the system took": f"{setup.save_seconds:.1f} s",
    }


def _kinds(kinds: Sequence[Kind], merging: Merged | None) -> str:
    head = ["per guest", *(_NAMES[kind.name] for kind in kinds)]
    rows = [
        ["start to first answer, first guest, files not in memory", *(_s(k.first) for k in kinds)],
        ["the same for the other guests: median (min-max)", *(_spread(k.seconds) for k in kinds)],
        ["host memory: Pss of the VMM", *(_mib(k.memory.pss) for k in kinds)],
        ["- the guest's own RAM", *(_mib(k.memory.ram_private) for k in kinds)],
        ["- QEMU's own private memory", *(_mib(k.memory.vmm_private) for k in kinds)],
        ["page tables of the VMM (not in Pss)", *(_mib(k.memory.page_tables) for k in kinds)],
        ["free memory taken, page cache included", *(_mib(k.memory.free_taken) for k in kinds)],
        ["MemAvailable taken", *(_mib(k.memory.available_taken) for k in kinds)],
        ["CPU of the VMM until the first answer", *(_s(k.cpu) for k in kinds)],
        ["CPU of ksmd, per guest", *(_s(k.helper_cpu) if k.helper_cpu else "0" for k in kinds)],
        ["CPU of an idle guest, of one core", *(f"{k.idle * 100:.2f} %" for k in kinds)],
    ]  # fmt: skip
    text = table(head, rows)
    if merging:
        text += (
            f"\n\nKSM took {merging.seconds:.0f} s, {merging.cpu:.1f} s of ksmd's CPU time and "
            f"{merging.full_scans} full scans. The guests of that column are those of the first."
        )
    return text


def _rooms(rooms: Sequence[Room]) -> str:
    most = {room.work: room for room in rooms if room.size == max(r.size for r in rooms)}
    head = ["work", "room", "CPU time", "relative to the most room", "dropped", "QEMU's own"]
    rows = [
        [
            room.work,
            _mib(room.size),
            _s(room.cpu),
            f"{room.cpu / most[room.work].cpu:.2f}",
            f"{room.dropped:g}",
            _mib(room.private),
        ]
        for room in rooms
    ]
    return table(head, rows)


def _starts(starts: Starts) -> str:
    rows = [
        ["`qemu -machine none -S`: until it answers a QMP command", starts.empty],
        ["bare `qemu -S`: the same", starts.bare],
        ["saved system without network: until the guest is ready", starts.alone["handed out"]],
    ]
    rows += [
        [f"saved system: until {MOMENTS[key]}", starts.moments[key]]
        for key in ("running", "handed out", "answered")
    ]
    rows += [
        ["the command `onecopy run SYSTEM`: until it exits", starts.command],
        ["prepared (`onecopy pool`): until the guest is ready", starts.prepared["handed out"]],
        [f"prepared: until {MOMENTS['answered']}", starts.prepared["answered"]],
        ["prepared: the command, until it exits", starts.prepared_command],
    ]
    cells = [
        [str(name), *_quartiles(spread), f"{spread.median / starts.bare.median:.2f}"]
        for name, spread in rows
        if isinstance(spread, Spread)
    ]
    head = ["from spawning QEMU, or the request", "median ms", "min-max ms", "times bare QEMU"]
    return table(head, cells) + f"\n\n{len(starts.bare.values)} starts of each, in turn."


def _phases(starts: Starts) -> str:
    rows = [[f"until {text}", *_quartiles(starts.phases[key])] for key, text in MOMENTS.items()]
    return table(["from the row above", "median ms", "min-max ms"], rows)


def _batches(batches: Batches) -> str:
    cold, number = batches.extrapolated, batches.guests
    rows = [
        [f"booted, {batches.cold_guests} guests", _s(batches.cold), ""],
        [f"booted, {number} guests (extrapolated)", _s(cold), "1.0"],
        [f"{number} clones", _s(batches.saved), f"{cold / batches.saved:.1f}"],
        [f"{number} prepared clones", _s(batches.prepared), f"{cold / batches.prepared:.1f}"],
    ]
    return table(["at once", "until all have answered over HTTP", "times faster"], rows)


def _first_starts(kinds: dict[str, FirstStart]) -> str:
    columns = list(kinds.values())
    rows = [
        ["major page faults in the guest", *(f"{c.faults.median:.0f}" for c in columns)],
        ["- of the program itself", *(f"{c.own_faults.median:.0f}" for c in columns)],
        ["read from block devices", *(format_size(int(c.bytes_read.median)) for c in columns)],
        ["seconds", *(_spread(c.seconds) for c in columns)],
    ]
    head = ["`perl -MPOSIX`", *(_NAMES[kind] for kind in kinds)]
    return table(head, rows) + f"\n\nMedians of {len(columns[0].faults.values)} guests each."


def _idle(kinds: Sequence[Idle]) -> str:
    """Format the host memory of one more clone, by kind of mapping."""
    head = ["per clone", *(f"{'forked' if k.forked else 'exec'}, {_MERGED[k.ksm]}" for k in kinds)]
    rows = [
        ["**host memory, all in**", *(f"**{_mib(k.all_in)}**" for k in kinds)],
        ["- in no file, shared pages divided (Pss_Anon)", *(_mib(k.anonymous) for k in kinds)],
        ["- page tables", *(_mib(k.page_tables) for k in kinds)],
        ["- kernel stacks, KSM's records", *(_mib(k.kernel) for k in kinds)],
        ["free memory taken, for any use", *(_mib(k.free_taken) for k in kinds)],
        ["CPU, of one core", *(f"{k.cpu * 100:.2f} %" for k in kinds)],
        ["start, KSM off: median", *(f"{k.start.median * 1e3:.1f} ms" for k in kinds)],
    ]
    for name in [place.name for place in kinds[0].places if place.anonymous]:
        places = [next(p for p in k.places if p.name == name) for k in kinds]
        rows.append([f"no other process maps: {name}", *(_mib(p.private) for p in places)])
    if any(k.merging for k in kinds):
        rows += _idle_merging(kinds)
    return table(head, rows) + f"\n\n{kinds[0].guests} clones, on top of one."


def _scan(kind: Idle, merging: Merged) -> float:
    """Return the CPU seconds of ksmd for one scan of one clone."""
    return merging.cpu / max(1, merging.full_scans) / (kind.guests + 1)


def _idle_merging(kinds: Sequence[Idle]) -> list[list[str]]:
    each: list[tuple[str, Callable[[Idle, Merged], str]]] = [
        ("KSM's profit", lambda k, _: _mib(k.profit)),
        ("CPU of ksmd until it merges no more", lambda k, m: _s(m.cpu / (k.guests + 1))),
        ("- one full scan", lambda k, m: f"{_scan(k, m) * 1e3:.1f} ms"),
        ("full scans, and their time", lambda _, m: f"{m.full_scans}, {_s(m.seconds)}"),
        ("merged pages of the host, once (pages_shared)", lambda _, m: _mib(m.shared)),
        ("and more often (pages_sharing)", lambda _, m: _mib(m.sharing)),
    ]
    return [
        [name, *(show(k, k.merging) if k.merging else "-" for k in kinds)] for name, show in each
    ]


def _first_guests(first: FirstGuests) -> str:
    cold = first.ways["cold"].seconds.median
    rows = [
        [
            WAYS[way],
            _spread(each.seconds),
            f"{each.seconds.median / cold:.2f}",
            f"{each.warming.median:.2f} s" if each.warming.high > 0.01 else "-",
            _mib(each.ahead.median),
            _mib(each.read.median),
            f"{each.waits.median:.0f}",
        ]
        for way, each in first.ways.items()
    ]
    head = ["files of the guest", "until it is ready", "relative to the first row"]
    head += ["`preload` before that", "read ahead", "read by the VMM", "its major faults"]
    ahead = _size(first.read_ahead)
    return table(head, rows) + (
        f"\n\nMedians of {len(first.ways['cold'].seconds.values)} starts each, in turn; dropped by "
        f"{first.dropped}. The record has {format_size(first.recorded)} of "
        f"{format_size(first.blobs)}. The kernel reads {ahead} ahead on this disk."
    )


def _layouts(layouts: Sequence[Layout]) -> str:
    places = {"root": "root", "segment": "segment, mounted"}
    head = ["", *(f"{places[k.place]}: {k.layout}" for k in layouts)]
    rows = [
        ["image", *(_mib(k.image) for k in layouts)],
        ["in the host's memory afterwards", *(_mib(k.resident.median) for k in layouts)],
    ]
    for name in PROGRAMS:
        programs = [k.programs[name] for k in layouts]
        rows += [
            [f"`{name}`: minor page faults", *(f"{p.faults.median:.0f}" for p in programs)],
            ["- of files, 4 KiB each", *(f"{p.small.median:.0f}" for p in programs)],
            ["- of files, 2 MiB each", *(f"{p.large.median:.0f}" for p in programs)],
            ["- 2 MiB refused", *(f"{p.refused.median:.0f}" for p in programs)],
            ["- page tables", *(f"{p.tables.median / 1024:.0f} KiB" for p in programs)],
            ["- CPU of the VMM, first start", *(_spread(p.cpu) for p in programs)],
            ["- CPU of the VMM, a further one", *(_spread(p.again) for p in programs)],
        ]
    number = len(layouts[0].resident.values)
    return table(head, rows) + f"\n\nMedians of {number} guests each (min-max)."


def _many(many: Many) -> str:
    times = many.beside.median / many.alone.median
    rows = [
        ["`run -n`, until all are ready", _s(many.started)],
        ["then until each has answered over HTTP", _s(many.answered)],
        ["one clone, while no other runs", _spread(many.alone)],
        [f"one clone, while all run ({times:.2f} times that)", _spread(many.beside)],
        ["`ps`", _spread(many.ps)],
        ["`report`", _spread(many.report)],
        ["`top` on a terminal, of one core", f"{many.top * 100:.1f} %"],
        ["`stop --all`", _s(many.stopped)],
        ["clones that shut down by themselves meanwhile", str(many.shut_down)],
        ["MemAvailable taken by each", _mib(many.available_taken)],
        ["memory of all when idle, shared memory included", _mib(many.memory)],
        ["- as `plan` said", _planned(many.planned.memory, many.memory)],
        ["the same when all have answered", _mib(many.worked)],
        ["- as `plan --work` said", _planned(many.planned_worked.memory, many.worked)],
        ["`run -n` as `plan` said", _planned_time(many)],
    ]
    return table([f"{many.guests} clones", ""], rows)


def _planned(said: int, was: int) -> str:
    return f"{_mib(said)} ({said / was - 1:+.0%})"


def _planned_time(many: Many) -> str:
    said = many.planned.seconds
    return "never" if said is None else f"{_s(said)} ({said / many.started - 1:+.0%})"


def _truth(truth: Truth) -> str:
    """Format the cross-checks of `report` and `advise`, and the cost of `advise`."""
    checks = {
        f"{truth.clones} clones": truth.clones_check,
        f"{truth.plain} plain": truth.plain_check,
    }
    sums = [
        [name, *(_mib(getattr(check, key)) for key, *_ in LINES), f"{check.ratio or 0:+.1%}"]
        for name, check in checks.items()
    ]
    claims = [
        [way, _mib(said), _mib(truth.came_true[way]), f"{said / truth.came_true[way]:.2f}"]
        for way, said in truth.claims.items()
    ]
    gib = truth.own / 2**30
    rows = [
        ["reading and hashing, per second of one core", f"{gib / truth.read_seconds:.1f} GiB"],
        ["copying as much by process_vm_readv(2)", f"{gib / truth.peek_seconds:.1f} GiB"],
        ["copying as much, memory to memory", f"{gib / truth.copy_seconds:.1f} GiB"],
        ["100 guests of 256 MiB: largest size of the process", _mib(truth.many_memory)],
        ["- CPU time to compare them", _s(truth.many_seconds)],
    ]
    head = ["report --check", *(name for _, name, _ in LINES), ""]
    return "\n\n".join(
        (
            table(head, sums),
            table([f"`advise`, {truth.plain} plain guests", "said", "came true", "ratio"], claims),
            table([f"`advise`, {_mib(truth.own)} of their own", ""], rows),
        )
    )


def _places(places: Sequence[Place]) -> str:
    rows = [[p.name, _mib(p.pss), _mib(p.private), _mib(p.rss)] for p in places]
    total = [sum(getattr(p, key) for p in places) for key in ("pss", "private", "rss")]
    rows.append(["together", *(_mib(figure) for figure in total)])
    return table(["per guest", "Pss", "private", "Rss"], rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table; all columns but the first are right-aligned."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _quartiles(spread: Spread) -> list[str]:
    return [f"{spread.median * 1e3:.1f}", f"{spread.low * 1e3:.1f}-{spread.high * 1e3:.1f}"]


def _spread(spread: Spread) -> str:
    return f"{_s(spread.median)} ({spread.low:.2f}-{spread.high:.2f})"


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s"


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def _size(size: int | None) -> str:
    return "unknown" if size is None else format_size(size)
