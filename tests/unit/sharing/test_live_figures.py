"""top: what is read cheaply, the order of rows, and the screen that comes of it."""

import os
from pathlib import Path

from msgspec.structs import replace

from onecopy.cli import top_cmd
from onecopy.guest.observe.top import View
from onecopy.linux import process
from onecopy.linux.counters import smaps
from onecopy.model import MIB
from onecopy.sharing import live_figures
from onecopy.sharing.live_figures import Row, Sample
from tests.unit.other_user import as_nobody

RECORDED = Path(__file__).parents[1] / "data/6.18.44-fc-v669"
A = Sample("a", 1, 10.0, 5 * MIB, 7 * MIB, 0, MIB, 0)
B = Sample("b", 2, 20.0, 6 * MIB, None, 0, MIB, 3 * MIB)


def test_recorded() -> None:
    (found,) = live_figures.sample(
        [("cold", 1001), ("gone", 2**22 + 1)], merging=True, root=RECORDED
    )
    mappings = smaps.read(1001, RECORDED)
    # The kernel counts both, this one in batches for each thread (proc_pid_status(5)).
    exact = sum(m.anonymous for m in mappings), sum(m.rss - m.anonymous for m in mappings)
    for told, figure in zip((found.own, found.shared), exact, strict=True):
        assert told is not None and abs(told - figure) < MIB
    assert (found.name, found.swapped, found.merged) == ("cold", 0, 0)


def test_a_user_sees_processes_of_others() -> None:
    pid = os.getpid()
    told = as_nobody(
        lambda: [each.own for each in live_figures.sample([("me", pid)], merging=True)]
    )
    assert told[0] > MIB


def test_a_kernel_that_does_not_tell(tmp_path: Path) -> None:
    folder = tmp_path / "proc/7"
    folder.mkdir(parents=True)
    (folder / "status").write_text("Name:\tx\nRssAnon:\t 4 kB\n")
    assert process.memory(7, tmp_path) == process.Memory(4096, None, None, None, None)


def test_processor_time_is_what_was_used_between() -> None:
    later = [replace(A, cpu_seconds=11.0), replace(B, pid=3)]
    first, second = live_figures.rows(later, [A, B], 4.0)
    # The other is a new process by the same name.
    assert (first.cpu, second.cpu) == (0.25, None)
    assert live_figures.rows(later, [], 4.0)[0].cpu is None


def test_order() -> None:
    assert tuple(top_cmd._KEYS.values()) == live_figures.SORTS
    assert list(top_cmd._KEYS) == [name[0] for name in live_figures.SORTS]
    some = [Row(A, 0.1), Row(B, None)]
    for by, names in (("cpu", "ab"), ("own", "ba"), ("shared", "ab"), ("merged", "ba")):
        assert "".join(row.sample.name for row in live_figures.ordered(some, by)) == names
    assert live_figures.ordered(reversed(some), "name") == some


def test_the_screen_has_room_for_the_first_only() -> None:
    many = [Row(replace(A, name=f"g{number:02}"), number / 100) for number in range(40)]
    view = View(many, 1.0, 8 << 30, 4 << 30, "KSM", [("python", MIB, None, 40)])
    lines = top_cmd._lines(view, "cpu", 24)
    assert len(lines) <= 24
    assert lines[4].startswith("g39") and "39.0%" in lines[4]
    assert any("... and" in line for line in lines)
    assert [line.split() for line in lines][-1] == ["python", "1.00", "?", "40"]
    assert len(top_cmd._lines(view, "name", None)) == 3 + 1 + 40 + 3
    empty = top_cmd._lines(View([], 0.0, 0, 0, "KSM", []), "cpu", 5)
    assert empty[0].startswith("0 guests")
