"""Lays out tables: columns are as wide as their content, or as the terminal allows.

Not here: the rows and columns (each command), output for scripts (listing.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from onecopy.printable import printable

_GAP = "  "
#: A column gets narrower than this only if all other columns have this width.
_LEAST = 8


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; on a terminal no line is wider than the terminal."""
    for line in table_lines(headings, rows, terminal_width()):
        print(line)


def terminal_width() -> int | None:
    """Return the width of the terminal; None if standard output is no terminal."""
    if not sys.stdout.isatty():
        return None
    if (told := os.environ.get("COLUMNS", "")).isdecimal() and int(told):
        return int(told)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except OSError:
        return None


def table_lines(
    headings: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None
) -> list[str]:
    """Lay out a table, with numbers aligned to the right.

    Args:
        headings: One for each column.
        rows: The cells of each row, one for each column.
        width: Columns of the terminal; the widest columns of text are shortened to fit. None
            shortens nothing.

    Returns:
        The lines, headings first.
    """
    table = [list(headings), *([printable(cell) for cell in row] for row in rows)]
    numeric = [bool(rows) and all(_is_figure(row[c]) for row in rows) for c in range(len(headings))]
    widths = [max(_cells(row[c]) for row in table) for c in range(len(headings))]
    if width is not None:
        widths = _fitted(widths, numeric, width)
    lines = []
    for row in table:
        cells = [
            _padded(_shortened(cell, size), size, right)
            for cell, size, right in zip(row, widths, numeric, strict=True)
        ]
        line = _GAP.join(cells).rstrip()
        lines.append(line if width is None else _shortened(line, width))
    return lines


def _is_figure(cell: str) -> bool:
    return cell[:1].isdigit() or cell in "-?"


def _fitted(widths: Sequence[int], numeric: Sequence[bool], width: int) -> list[int]:
    """Return narrower widths for columns of text, the widest first, until the line fits."""
    found = list(widths)
    room = width - len(_GAP) * (len(found) - 1)
    while sum(found) > room:
        texts = [c for c in range(len(found)) if not numeric[c] and found[c] > _LEAST]
        if not texts:
            break
        found[max(texts, key=lambda c: found[c])] -= 1
    return found


def _cells(text: str) -> int:
    """Return the number of terminal columns that a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - _cells(text))
    return space + text if right else text + space


def _shortened(text: str, width: int) -> str:
    if _cells(text) <= width:
        return text
    while _cells(text) > max(width - 1, 0):
        text = text[:-1]
    return f"{text}{_mark()}"[: max(width, 0)]


def _mark() -> str:
    """Return the character that marks a shortened cell."""
    return "…" if (sys.stdout.encoding or "").lower().replace("-", "") == "utf8" else "~"
