"""onecopy top"""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from onecopy.cli.commands import Command
from onecopy.cli.output import as_it_is
from onecopy.cli.params import SecondsType
from onecopy.cli.tables import table_lines
from onecopy.model import format_size
from onecopy.printable import printable

if TYPE_CHECKING:
    from onecopy.guest.observe.top import View
    from onecopy.sharing.live_figures import Row

#: The keys that select an order: the first letters of SORTS, as a test checks.
_KEYS = {"c": "cpu", "o": "own", "s": "shared", "m": "merged", "n": "name"}


@click.command(
    "top",
    cls=Command,
    examples=[
        ("onecopy top", "Watch all guests until q is typed."),
        ("onecopy top --sort own --interval 10 >figures", "Print one sample of 10 seconds."),
    ],
)
@click.option(
    "--sort",
    type=click.Choice(list(_KEYS.values())),
    default="cpu",
    show_default=True,
    help="Order of the guests. The keys c, o, s, m and n change it.",
)
@click.option(
    "--interval",
    type=SecondsType(0.2),
    default=3.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two samples, in seconds.",
)
def command(sort: str, interval: float) -> None:
    """Watch the memory and CPU use of guests.

    q ends the command. Without a terminal it prints one sample, after one interval. Figures are
    MiB. OWN is anonymous memory, in which a merged page counts once for each place. `onecopy
    report` is more exact, and takes longer.
    """
    from onecopy.guest.observe.top import Watch
    from onecopy.guest.runtime import Runtime

    watch = Watch(Runtime.open())
    watch.look()
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        time.sleep(interval)
        print("\n".join(_lines(watch.look(), sort)))
        return
    _live(watch.look, sort, interval)


def _live(look: Callable[[], View], sort: str, interval: float) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(file=as_it_is(sys.stdout))
    with _keys(), Live(console=console, screen=True, auto_refresh=False) as live:
        view = look()
        while True:
            lines = _lines(view, sort, console.height, console.width)
            text = Text("\n".join(map(printable, lines)), no_wrap=True, overflow="crop")
            live.update(text, refresh=True)
            key = _read_key(interval)
            if key == "q":
                return
            if key in _KEYS:
                sort = _KEYS[key]
            else:
                view = look()


@contextmanager
def _keys() -> Iterator[None]:
    """Read keys unbuffered and without echo; Ctrl-C still ends the command."""
    before = termios.tcgetattr(0)
    try:
        tty.setcbreak(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _read_key(seconds: float) -> str:
    """Wait up to ``seconds`` for a key; "" is no key, ``q`` also a closed standard input."""
    ready, _, _ = select.select([0], [], [], seconds)
    if not ready:
        return ""
    return os.read(0, 1).decode(errors="replace") or "q"


def _lines(view: View, sort: str, height: int | None = None, width: int | None = None) -> list[str]:
    """Return the lines of the screen: at most ``height`` lines of ``width`` columns."""
    from onecopy.sharing.live_figures import ordered

    head = [
        f"{len(view.rows)} guests, CPU {_percent(view.cpu)}    memory {format_size(view.total)}, "
        f"available {format_size(view.available)}    sorted by {sort}",
        view.merging,
        "",
    ]
    files = [
        [name if width else name[:40], _mib(size), _mib(resident), str(guests)]
        for name, size, resident, guests in view.files
    ]
    below = ["", *table_lines(["SHARED FILE", "SIZE", "RESIDENT", "GUESTS"], files, width)]
    room = None if height is None else max(height - len(head) - len(below) - 2, 1)
    rows = ordered(view.rows, sort)
    guests = table_lines(
        ["GUEST", "PID", "CPU", "OWN", "SHARED", "MERGED", "SWAPPED", "PAGE TABLES"],
        [_row(row) for row in rows[:room]],
        width,
    )
    more = [f"... and {len(rows) - room} more"] if room and len(rows) > room else []
    return [*head, *guests, *more, *below]


def _row(row: Row) -> Sequence[str]:
    each = row.sample
    sizes = (each.own, each.shared, each.merged, each.swapped, each.page_tables)
    return [each.name, str(each.pid), _percent(row.cpu), *map(_mib, sizes)]


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{share * 100:.1f}%"


def _mib(size: int | None) -> str:
    return "?" if size is None else f"{size / (1 << 20):.2f}"
