"""Formats the results as Markdown. Not here: their meaning (docs/comparison.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.compare.run import Outcome
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


def tables(machine: Mapping[str, str], found: Sequence[Outcome]) -> str:
    """Format the machine's description, and a table for each number of guests."""
    parts = ["### The machine\n\n" + table(["", ""], [[*item] for item in machine.items()])]
    parts += [f"### {title(same)}\n\n{_table(same)}" for same in groups(found)]
    return "\n\n".join(parts) + "\n"


def groups(found: Sequence[Outcome]) -> list[list[Outcome]]:
    """Group the results by guests."""
    keys = dict.fromkeys((each.guests, each.alike) for each in found)
    return [[each for each in found if (each.guests, each.alike) == key] for key in keys]


def title(same: Sequence[Outcome]) -> str:
    """Return the title of a table or plot."""
    kind = "with one root in common" if same[0].alike else "each with a root of its own"
    return f"{same[0].guests} guests, {kind}"


def _table(found: Sequence[Outcome]) -> str:
    rows: list[tuple[str, Callable[[Outcome], str]]] = [
        ("host memory, all guests idle, MiB", lambda o: f"{o.idle_memory / MIB:.0f}"),
        ("the same per guest", lambda o: f"{o.idle_memory / MIB / o.guests:.1f}"),
        ("sum of their VMMs' Pss, MiB", lambda o: f"{o.pss / MIB:.0f}"),
        ("after some have worked, MiB", lambda o: f"{o.worked / MIB:.0f}"),
        ("maximum, MiB", lambda o: f"{o.peak / MIB:.0f}"),
        ("start until the application answers: first guest, s", lambda o: f"{o.first:.2f}"),
        ("the other guests, median, s", lambda o: f"{o.seconds.median:.2f}"),
        ("CPU until then, median, s", lambda o: f"{o.boot_cpu:.2f}"),
        ("CPU of all guests to the end, s", lambda o: f"{o.vmm_cpu:.0f}"),
        ("CPU of ksmd, s", lambda o: f"{o.ksm_cpu:.1f}"),
        ("an idle guest, % of a core", lambda o: f"{o.idle * 100:.2f}"),
        *(
            (f"first start of a program beside {name}, s", _program(name))
            for name in found[0].program
        ),
        *((f"{name}, answers per second inside a guest", _load(name)) for name in found[0].load),
    ]
    head = ["", *(LABELS[each.way] for each in found)]
    return table(head, [[name, *(show(each) for each in found)] for name, show in rows])


def _program(name: str) -> Callable[[Outcome], str]:
    return lambda outcome: f"{outcome.program[name]:.2f}"


def _load(name: str) -> Callable[[Outcome], str]:
    return lambda outcome: f"{outcome.load[name]:.0f}"
