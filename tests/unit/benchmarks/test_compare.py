"""compare: what was found, as tables and pictures. The runs themselves: script/compare."""

import mmap
import os
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.compare.mix import ROOT, applications
from benchmarks.compare.plots import plot_all
from benchmarks.compare.run import Outcome, Timeline
from benchmarks.compare.tables import tables
from benchmarks.counts import Counts, medians
from benchmarks.figures import Spread
from onecopy.model import MIB, check_new_name

LINE = Timeline(
    began=0.0,
    seconds=[0.0, 1.0, 2.0],
    used=[0, 100 * MIB, 80 * MIB],
    marks={"all answer": 0.5, "idle": 1.5},
)
NONE = Outcome(
    way="none",
    guests=4,
    alike=True,
    first=6.0,
    seconds=Spread.of([5.0, 4.0, 4.5]),
    boot_cpu=4.0,
    boot_counts=Counts(exits=None, faults=800, read=3 * MIB),
    counts=Counts(exits=None, faults=900, read=4 * MIB),
    idle_memory=80 * MIB,
    pss=70 * MIB,
    worked=90 * MIB,
    peak=100 * MIB,
    idle=0.01,
    vmm_cpu=30.0,
    ksm_cpu=0.0,
    program={"python": 1.0},
    load={"python": 82.4},
    timeline=LINE,
)
FOUND = [
    NONE,
    replace(NONE, way="all", idle_memory=20 * MIB, ksm_cpu=2.5, counts=Counts(5e6, 1, 0)),
    replace(NONE, way="none", alike=False, idle_memory=200 * MIB),
]


def test_each_kind_of_guests_has_a_table() -> None:
    text = tables({"memory": "24 GiB"}, FOUND)
    alike, different = text.split("### ")[2:]
    assert alike.startswith("4 guests, with one root in common")
    assert different.startswith("4 guests, each with a root of its own")
    assert "|  | no sharing | saved system + KSM |" in alike
    assert "| the same per guest | 20.0 | 5.0 |" in alike
    assert "| CPU of ksmd, s | 0.0 | 2.5 |" in alike
    assert "| read from disks until then, median, MiB | 3.0 | 3.0 |" in alike
    assert "| VM exits of a guest to the end, median | - | 5000000 |" in alike
    assert "| the same per guest | 50.0 |" in different
    assert "| work inside a guest: python, answers per second | 82 |" in different


def test_times_that_are_not_real_are_relative() -> None:
    found = [NONE, replace(NONE, way="all", first=3.0, ksm_cpu=15.0)]
    text = tables({}, found, ratios=True)
    assert "first guest, relative | 1.00 | 0.50 |" in text
    assert "| CPU of ksmd / that of the guests | 0.00 | 0.50 |" in text
    assert ", s |" not in text


def test_counts_are_the_kernel_s() -> None:
    before = Counts.of(os.getpid())
    touched = mmap.mmap(-1, 8 * MIB)
    touched.madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(0, 8 * MIB, mmap.PAGESIZE):
        touched[at] = 1
    after = Counts.of(os.getpid())
    assert after.faults - before.faults >= 2048
    assert after.exits is None
    assert medians([before, after, after]) == after


def test_its_names_are_no_reserved_ones() -> None:
    check_new_name(ROOT.name)


def test_applications_have_their_programs() -> None:
    assert [each.name for each in applications()] == ["python", "nginx", "redis"]


def test_pictures(tmp_path: Path) -> None:
    plot_all(FOUND, tmp_path)
    names = ["bars-alike-4", "bars-different-4", "memory-alike-4", "memory-different-4"]
    assert sorted(path.stem for path in tmp_path.glob("*.svg")) == names
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == names
    for path in tmp_path.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")  # noqa: S314 - our own
