"""Tables: columns as wide as their content, and never wider than the terminal."""

import io
import os
import pty
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from onecopy.cli import tables
from onecopy.cli.tables import table_lines

HEADINGS = ["NAME", "SIZE", "WHY"]
ROWS = [["web-1", "1.5 MiB", "it is the first of all guests"], ["a-long-name-of-a-guest", "?", "-"]]


def test_without_a_width_all_is_shown() -> None:
    assert table_lines(HEADINGS, ROWS) == [
        "NAME                       SIZE  WHY",
        "web-1                   1.5 MiB  it is the first of all guests",
        "a-long-name-of-a-guest        ?  -",
    ]


def test_the_widest_columns_of_text_are_shortened() -> None:
    assert table_lines(HEADINGS, ROWS, 40) == [
        "NAME               SIZE  WHY",
        "web-1           1.5 MiB  it is the firs…",
        "a-long-name-o…        ?  -",
    ]


@given(
    st.lists(st.lists(st.text(max_size=30), min_size=3, max_size=3), max_size=5),
    st.integers(1, 80),
)
def test_no_line_is_wider_than_the_terminal(rows: list[list[str]], width: int) -> None:
    for line in table_lines(HEADINGS, rows, width):
        assert cell_len(line) <= width


@given(st.lists(st.lists(st.text(max_size=9), min_size=3, max_size=3), max_size=5))
def test_nothing_is_shortened_where_there_is_room(rows: list[list[str]]) -> None:
    assert table_lines(HEADINGS, rows, 1000) == table_lines(HEADINGS, rows)


def test_wide_characters_count_as_two() -> None:
    lines = table_lines(["A", "B"], [["東京", "x"], ["ab", "y"]])
    assert lines == ["A     B", "東京  x", "ab    y"]


def test_the_width_is_the_terminal_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert tables.terminal_width() is None
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    with os.fdopen(slave, "w") as terminal, os.fdopen(master):
        import fcntl
        import struct
        import termios

        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 57, 0, 0))
        monkeypatch.setattr(sys, "stdout", terminal)
        assert tables.terminal_width() == 57
        monkeypatch.setenv("COLUMNS", "33")
        assert tables.terminal_width() == 33
