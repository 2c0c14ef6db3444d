"""How commands speak: tables and JSON on standard output, progress on standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from onecopy.errors import Interrupted, OnecopyError, OutputFailed

_T = TypeVar("_T")


def print_json(value: object) -> None:
    """One JSON document."""
    utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
    print(json.dumps(value, indent=2, sort_keys=False, ensure_ascii=not utf8))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their content; figures to the right."""
    for line in table_lines(headings, rows):
        print(line)


def table_lines(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """What `print_table` prints."""
    table = [list(headings), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    numeric = [
        bool(rows) and all(row[c][:1].isdigit() or row[c] in "-?" for row in rows)
        for c in range(len(headings))
    ]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that tells the present step: live on a terminal, else plain lines."""
    if not sys.stderr.isatty():
        yield lambda text: print(f"onecopy: {text}", file=sys.stderr, flush=True)
        return
    from rich.console import Console

    with Console(stderr=True).status("...") as status:

        def tell(text: str) -> None:
            escaped = text.replace("[", r"\[")
            status.update(escaped)
            if text.startswith("left out: "):
                # That stays on the screen.
                status.console.print(f"onecopy: {escaped}")

        yield tell


def each_of(items: Iterable[_T], work: Callable[[_T], object]) -> int:
    """Do ``work`` for each, whatever becomes of the others.

    Errors are told as they come; returns the exit code of the first one, or 0.
    """
    codes = []
    for item in items:
        try:
            work(item)
        except (OutputFailed, Interrupted):
            raise
        except OnecopyError as error:
            show_place(error)
            tell_error(error)
            codes.append(error.exit_code)
    return next(iter(codes), 0)


def show_place(error: Exception) -> None:
    """Print where an error comes from, for who has asked for that (ONECOPY_DEBUG=1)."""
    if os.environ.get("ONECOPY_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)


def tell_error(error: OnecopyError) -> None:
    """Print an error and its hint."""
    for text in filter(None, (error.message, error.hint)):
        print(f"onecopy: {text}", file=sys.stderr)


def duration(seconds: float) -> str:
    """For a reader: 0.052 s, 12 s, 3 min, 2 h."""
    if seconds < 10:
        return f"{seconds:.3f} s"
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"
