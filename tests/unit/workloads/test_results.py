"""How the workloads' results are read, compared and written; not the workloads themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workloads import expected, table, tap
from tests.workloads.aged import Campaign, Clone
from tests.workloads.places import PROGRAMS
from tests.workloads.tap import End

GOOD = "ok 1 - a\nnot ok 2 - b\nok 3 - c # SKIP no network\n# own id 7\n1..3\n## said\n"


def results(**ends: End) -> tap.Results:
    return tap.Results(dict(ends), {})


def test_results_are_read() -> None:
    read = tap.parse(GOOD)
    assert read.ends == {"a": End.PASSED, "b": End.FAILED, "c": End.SKIPPED}
    assert read.own == {"id": "7"}
    assert [read.count(end) for end in End] == [1, 1, 1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1..0\n",
        GOOD.replace("1..3\n", ""),
        GOOD.replace("1..3", "1..4"),
        GOOD.replace("ok 3", "ok 4"),
        GOOD.replace("- c", "- a"),
        GOOD.replace("ok 1 - a\n", ""),
        f"{GOOD}ok 4 - late\n",
    ],
)
def test_what_is_cut_off_is_no_result(text: str) -> None:
    with pytest.raises(tap.Lost):
        tap.parse(text)


PASSED, FAILED, SKIPPED = End.PASSED, End.FAILED, End.SKIPPED
ENTRY = expected.Expected("w", "t?", FAILED, PASSED, "a reason")


@pytest.mark.parametrize(
    ("chroot", "booted", "clone", "entries", "wrong"),
    [
        (PASSED, PASSED, PASSED, (), False),
        (SKIPPED, SKIPPED, SKIPPED, (), False),
        (PASSED, PASSED, FAILED, (), True),
        (PASSED, SKIPPED, PASSED, (), True),
        (SKIPPED, PASSED, PASSED, (), False),
        (SKIPPED, PASSED, SKIPPED, (), True),
        (SKIPPED, FAILED, FAILED, (), True),
        (FAILED, FAILED, FAILED, (), True),
        (FAILED, PASSED, PASSED, (ENTRY,), False),
        (FAILED, PASSED, FAILED, (ENTRY,), True),
        (PASSED, PASSED, PASSED, (ENTRY,), True),
    ],
)
def test_places_are_compared(
    chroot: End, booted: End, clone: End, entries: tuple[expected.Expected, ...], wrong: bool
) -> None:
    places = {"chroot": results(t1=chroot), "booted": results(t1=booted)}
    places["clone 1"] = results(t1=clone)
    assert bool(expected.differences("w", places, entries)) is wrong


def test_what_only_guests_can_run_is_counted() -> None:
    places = {"chroot": results(a=SKIPPED, b=PASSED), "booted": results(a=PASSED, b=PASSED)}
    assert expected.only_in_guests(places) == 1
    assert expected.only_in_guests({"booted": results(a=PASSED)}) == 0


def test_a_test_that_is_missing_somewhere_differs() -> None:
    places = {"booted": results(a=PASSED, b=PASSED), "clone 1": results(a=PASSED)}
    assert expected.differences("w", places) == ["b: booted passed, clone 1 missing"]


def test_an_entry_of_which_no_test_ran_is_no_difference() -> None:
    assert expected.differences("w", {"booted": results(other=PASSED)}, (ENTRY,)) == []


def test_what_is_a_clones_own_is_alike_in_none() -> None:
    places = {name: tap.Results({"a": PASSED}, {"id": "7"}) for name in ("clone 1", "clone 2")}
    assert expected.not_own(places) == ["id of clone 1 and clone 2 is the same: 7"]


def test_timers_and_names_are_wrong() -> None:
    clones = [Clone("a-1", ["logrotate.service"], []), Clone("a-2", [], ["x as a-1"])]
    done = Campaign("tcg", clones, 1, 1, 1, 1)
    assert done.wrong() == ["a-1 ran logrotate.service", "a-2 logged x as a-1"]
    assert table.of_aged(done).wrong


def test_rows_replace_those_of_the_same_workload(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\n{table.plain(())}\n{table.END}\nafter\n")
    table.write(page, [table.Row("one", "sid", booted="1 passed"), table.Row("two", "sid")])
    table.write(page, [table.failed("one:sid", "lost | gone\nmore")])
    assert "| **lost / gone** |" in page.read_text()
    table.write(page, [table.Row("one", "sid", booted="2 passed")])
    text = page.read_text()
    assert "2 passed" in text and "| two | sid |" in text
    assert "1 passed" not in text and "lost" not in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")


#: A module of tests of each kind.
MODULE = """\
import unittest

class T(unittest.TestCase):
    def test_passes(self): pass
    def test_fails(self): self.fail()
    def test_subtests(self):
        with self.subTest(1): self.fail()
        with self.subTest(2): pass
    @unittest.skip("no")
    def test_skipped(self): pass
    @unittest.expectedFailure
    def test_fails_as_expected(self): self.fail()
    @unittest.expectedFailure
    def test_does_not(self): pass
"""


def test_cpythons_tests_are_told(tmp_path: Path) -> None:
    package = tmp_path / "test"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "support.py").touch()
    (package / "test_kinds.py").write_text(MODULE)
    (package / "test_exits.py").write_text("import os\nos._exit(0)\n")
    (package / "test_not_here.py").write_text("import unittest\nraise unittest.SkipTest('no')\n")
    argv = [
        sys.executable,
        str(PROGRAMS / "cpython.py"),
        "test_kinds",
        "test_exits",
        "test_not_here",
    ]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    read = tap.parse(done.stdout)
    told = {name.removeprefix("test.test_kinds.T."): end for name, end in read.ends.items()}
    assert told == {
        "test_passes": PASSED,
        "test_fails": FAILED,
        "test_subtests": FAILED,
        "test_skipped": SKIPPED,
        "test_fails_as_expected": PASSED,
        "test_does_not": FAILED,
        "test.test_exits: did not come to its end": FAILED,
        "test.test_not_here": SKIPPED,
    }
