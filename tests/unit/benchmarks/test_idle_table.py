"""The table of idle clones: a column for each way and kind of merging, with what merging cost.

Not here: the measurement, which needs guests (script/bench idle).
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.figures import Spread
from benchmarks.idle import Idle
from benchmarks.merging import Merged
from benchmarks.places import Place
from benchmarks.report import Report
from onecopy.model import MIB, Mergeable

PLAIN = Idle(
    guests=3,
    forked=False,
    ksm=Mergeable.NONE,
    start=Spread.of([0.07, 0.09, 0.08]),
    anonymous=10 * MIB,
    page_tables=0.5 * MIB,
    kernel=0.25 * MIB,
    free_taken=11 * MIB,
    places=[Place("heap", 6 * MIB, 6 * MIB, 5 * MIB, 6 * MIB), Place("code", 1, 1, 0, 0)],
    cpu=0.001,
    profit=0,
    merging=None,
)
MERGED = replace(
    PLAIN,
    forked=True,
    ksm=Mergeable.ALL,
    profit=2 * MIB,
    merging=Merged(seconds=12.5, cpu=2.0, full_scans=7, shared=3 * MIB, sharing=9 * MIB),
)


def rows(*kinds: Idle) -> dict[str, list[str]]:
    text = Report({}, idle=list(kinds)).to_markdown()
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if "|" in line]
    return {each[0]: each[1:] for each in cells}


def test_each_kind_has_a_column() -> None:
    found = rows(PLAIN, MERGED)
    assert found["per clone"] == ["exec, no KSM", "forked, KSM: all"]
    assert found["**host memory, all in**"] == ["**10.8 MiB**"] * 2
    assert found["start, KSM off: median"] == ["80.0 ms"] * 2
    assert found["no other process maps: heap"] == ["5.0 MiB"] * 2
    # Of files alone.
    assert "no other process maps: code" not in found
    assert found["KSM's profit"] == ["-", "2.0 MiB"]
    # Four clones were scanned: one ran before.
    assert found["CPU of ksmd until it merges no more"] == ["-", "0.50 s"]
    assert found["- one full scan"] == ["-", "71.4 ms"]
    assert found["full scans, and their time"] == ["-", "7, 12.50 s"]


def test_without_ksm_nothing_tells_of_it() -> None:
    assert not [name for name in rows(PLAIN) if "KSM's profit" in name or "ksmd" in name]
