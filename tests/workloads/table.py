"""Writes the table of docs/workloads.md: what ran where, with its result; other rows stay."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from onecopy.errors import OnecopyError
from onecopy.model import format_size
from tests.workloads.aged import Campaign
from tests.workloads.campaign import Outcome
from tests.workloads.expected import only_in_guests
from tests.workloads.powercut import Cut, Database
from tests.workloads.tap import End, Lost, Results

BEGIN, END = "<!-- script/workloads --write: begin -->", "<!-- end -->"
_HEAD = ("workload", "Debian", "accelerator", "chroot", "booted", "clones", "result")


class Row(msgspec.Struct, frozen=True):
    """One line of the table; what does not apply is ""."""

    workload: str
    suite: str = ""
    accel: str = ""
    chroot: str = ""
    booted: str = ""
    clones: str = ""
    result: str = "same"
    wrong: bool = False

    @property
    def cells(self) -> tuple[str, ...]:
        """What is printed."""
        result = f"**{self.result}**" if self.wrong else self.result
        return (
            *(self.workload, self.suite, self.accel),
            *(self.chroot, self.booted, self.clones, result),
        )


def of_outcome(outcome: Outcome) -> Row:
    """The row of a workload that ran in all its places."""
    results = outcome.results
    clones = [each for place, each in results.items() if place.startswith("clone")]
    told = sorted({_counts(each) for each in clones})
    root = outcome.workload.root
    return Row(
        outcome.workload.name,
        root.suite,
        outcome.accel,
        _counts(results["chroot"]) if "chroot" in results else "",
        _counts(results["booted"]),
        f"{len(clones)} x {' or '.join(told)}",
        f"{len(outcome.wrong)} differ" if outcome.wrong else _same(results),
        bool(outcome.wrong),
    )


def _same(results: Mapping[str, Results]) -> str:
    more = only_in_guests(results)
    return f"same; {more} tests skipped in the chroot only" if more else "same"


def _counts(results: Results) -> str:
    """``passed`` or ``passed, N skipped, N failed``."""
    told = [f"{results.count(End.PASSED)} passed"]
    told += [f"{n} {e.value}" for e in (End.SKIPPED, End.FAILED) if (n := results.count(e))]
    return ", ".join(told)


def of_cuts(database: Database, done: Sequence[Cut]) -> Row:
    """The row of a database whose guests lost their power."""
    counts = {kind: sum(cut.kind == kind for cut in done) for kind in ("booted", "clone")}
    return Row(
        f"power cuts: {database.name}",
        database.root.suite,
        done[-1].accel,
        "",
        f"{counts['booted']} cuts",
        f"{counts['clone']} cuts",
        f"all {done[-1].acknowledged} acknowledged commits are there",
    )


def of_aged(done: Campaign) -> Row:
    """The row of the old system's clones."""
    wrong = done.wrong()
    times, memory = done.seconds / done.fresh_seconds, done.memory / done.fresh_memory
    told = f"{times:.2f} of the time and {memory:.2f} of the memory of a fresh system's"
    ran = sum(bool(clone.ran) for clone in done.clones)
    names = sum(bool(clone.wrong_names) for clone in done.clones)
    result = f"in {ran} timers fired, {names} have wrong names" if wrong else "nothing fired"
    return Row(
        "two days old",
        "trixie",
        done.accel,
        clones=f"{len(done.clones)}: {told} ({format_size(int(done.memory))} each)",
        result=result,
        wrong=bool(wrong),
    )


def of_pytest(name: str, report: Path) -> Row:
    """The row of pytest's report; raise Lost if it is missing or has no test."""
    try:
        suite = next(ET.parse(report).iter("testsuite"))  # noqa: S314
    except (OSError, ET.ParseError, StopIteration):
        raise Lost(f"{name}: pytest wrote no report") from None
    keys = ("tests", "failures", "errors", "skipped")
    tests, failures, errors, skipped = (int(suite.get(key, 0)) for key in keys)
    if not tests:
        raise Lost(f"{name}: no test ran")
    bad = failures + errors + skipped
    told = f"{tests - bad} of {tests} tests passed"
    return Row(
        name, booted=told, clones=told, result="failed" if bad else "passed", wrong=bool(bad)
    )


def failed(name: str, why: str) -> Row:
    """The row of what did not come to its end."""
    workload, _, suite = name.partition(":")
    result = (why.splitlines() or ["no result"])[0][:120].replace("|", "/")
    return Row(workload, suite, result=result, wrong=True)


def plain(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [_HEAD, ("---",) * len(_HEAD), *(row.cells for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write(path: Path, rows: Sequence[Row]) -> None:
    """Put the rows between the marks of ``path``, in place of those of the same workloads."""
    before, mark, rest = path.read_text().partition(BEGIN)
    old, end, after = rest.partition(END)
    if not mark or not end:
        raise OnecopyError(f"{path} has no marks {BEGIN} and {END}")
    new = {row.cells[:2]: "| " + " | ".join(row.cells) + " |" for row in rows}
    kept = {}
    for line in old.strip().splitlines()[2:]:
        cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
        kept[cells[:2]] = line
    lines = [*plain(()).splitlines(), *(kept | new).values()]
    path.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")
