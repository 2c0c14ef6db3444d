"""Formats the results as Markdown. Not here: their meaning (docs/comparison.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.compare.run import Outcome
from benchmarks.counts import Counts
from benchmarks.report import table
from onecopy.model import MIB

#: Names of the ways in tables.
LABELS = {
    "none": "no sharing",
    "ksm": "KSM",
    "xip": "segment (XIP)",
    "template": "frozen guest, disk",
    "saved+xip": "saved system (with XIP)",
    "all": "saved system + KSM",
}


def tables(machine: Mapping[str, str], found: Sequence[Outcome], *, ratios: bool = False) -> str:
    """Format the machine's description, and a table for each number of guests.

    Args:
        ratios: show times as multiples of the first way's, because the host's time is not real.
    """
    parts = ["### The machine\n\n" + table(["", ""], [[*item] for item in machine.items()])]
    parts += [f"### {title(same)}\n\n{_table(same, ratios=ratios)}" for same in groups(found)]
    return "\n\n".join(parts) + "\n"


def groups(found: Sequence[Outcome]) -> list[list[Outcome]]:
    """Group the results by guests."""
    keys = dict.fromkeys((each.guests, each.alike) for each in found)
    return [[each for each in found if (each.guests, each.alike) == key] for key in keys]


def title(same: Sequence[Outcome]) -> str:
    """Return the title of a table or plot."""
    kind = "with one root in common" if same[0].alike else "each with a root of its own"
    return f"{same[0].guests} guests, {kind}"


def _table(found: Sequence[Outcome], *, ratios: bool) -> str:
    head = ["", *(LABELS[each.way] for each in found)]
    rows = [[name, *(show(each) for each in found)] for name, show in _COUNTED]
    for name, unit, value, digits in _timed(found[0]):
        if ratios:
            base = value(found[0])
            shown = [f"{value(each) / base:.2f}" if base else "-" for each in found]
            rows.append([f"{name}, relative", *shown])
        else:
            rows.append([f"{name}, {unit}", *(f"{value(each):.{digits}f}" for each in found)])
    # Its unit is that of the other times, but there is none without KSM.
    ksmd = [
        f"{each.ksm_cpu / each.vmm_cpu:.2f}" if ratios else f"{each.ksm_cpu:.1f}" for each in found
    ]
    name = "CPU of ksmd / that of the guests" if ratios else "CPU of ksmd, s"
    return table(head, [*rows, [name, *ksmd]])


#: Label -> figure, for those that do not depend on the machine's speed.
_COUNTED: list[tuple[str, Callable[[Outcome], str]]] = [
    ("host memory, all guests idle, MiB", lambda o: f"{o.idle_memory / MIB:.0f}"),
    ("the same per guest", lambda o: f"{o.idle_memory / MIB / o.guests:.1f}"),
    ("sum of their VMMs' Pss, MiB", lambda o: f"{o.pss / MIB:.0f}"),
    ("after some have worked, MiB", lambda o: f"{o.worked / MIB:.0f}"),
    ("maximum, MiB", lambda o: f"{o.peak / MIB:.0f}"),
    ("VM exits until the application answers, median", lambda o: _exits(o.boot_counts)),
    ("page faults of the VMM until then, median", lambda o: f"{o.boot_counts.faults:.0f}"),
    ("read from disks until then, median, MiB", lambda o: f"{o.boot_counts.read / MIB:.1f}"),
    ("VM exits of a guest to the end, median", lambda o: _exits(o.counts)),
]


def _timed(one: Outcome) -> list[tuple[str, str, Callable[[Outcome], float], int]]:
    """Return the figures that do depend on it: label, unit, value and digits."""
    return [
        ("start until the application answers: first guest", "s", lambda o: o.first, 2),
        ("the other guests, median", "s", lambda o: o.seconds.median, 2),
        ("CPU until then, median", "s", lambda o: o.boot_cpu, 2),
        ("CPU of all guests to the end", "s", lambda o: o.vmm_cpu, 0),
        ("CPU of an idle guest", "% of a core", lambda o: o.idle * 100, 2),
        *(
            (f"first start of a program beside {name}", "s", _program(name), 2)
            for name in one.program
        ),
        *(
            (f"work inside a guest: {name}", "answers per second", _load(name), 0)
            for name in one.load
        ),
    ]


def _exits(counts: Counts) -> str:
    return "-" if counts.exits is None else f"{counts.exits:.0f}"


def _program(name: str) -> Callable[[Outcome], float]:
    return lambda outcome: outcome.program[name]


def _load(name: str) -> Callable[[Outcome], float]:
    return lambda outcome: outcome.load[name]
