"""The output of commands: lines and JSON on standard output, progress on standard error.

Text and names from guests, files and other processes never reach a terminal unescaped: `main` puts
both streams behind `escaping`. Bytes that are written to ``sys.stdout.buffer`` stay unchanged
(exec, console, logs --raw).
"""

from __future__ import annotations

import codecs
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

from onecopy.errors import Interrupted, OnecopyError, OutputFailed
from onecopy.printable import escape, printable

if TYPE_CHECKING:
    from onecopy.guest.run_directory import GuestRecord

_T = TypeVar("_T")
_NOT_ASCII = re.compile("[^\0-\x7f]")


class _Escaping:
    """A text stream that escapes control characters, except newlines and tabs."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(printable(text, keep="\n\t"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def escaping() -> Iterator[None]:
    """Escape control characters in all text written to standard output and error."""
    before = sys.stdout, sys.stderr
    # A closed stream is None.
    sys.stdout, sys.stderr = (cast(TextIO, each and _Escaping(each)) for each in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def as_it_is(stream: TextIO) -> TextIO:
    """Return the stream behind `escaping`, for text that is already printable."""
    return stream.stream if isinstance(stream, _Escaping) else stream


def print_line(text: str, to: TextIO | None = None) -> None:
    """Print exactly one line: newlines in the text are escaped."""
    print(printable(text, keep="\t"), file=to or sys.stdout, flush=to is not None)


def tell_error(error: OnecopyError, before: str = "") -> None:
    """Print the message of an error and its hint.

    Output of other programs is indented, so that no line of it looks like a message of onecopy.
    """
    from onecopy.cli.suggest import hint_of

    message = error.message.replace("\n", "\n    ")
    print(f"onecopy: {before}{message}", file=sys.stderr)
    if error.hint and not before:
        print_line(f"hint: {hint_of(error)}", sys.stderr)


def print_json(value: object) -> None:
    """Print one JSON document; control characters are escaped."""
    import json  # most output is text

    text = json.dumps(value, indent=2, sort_keys=False, ensure_ascii=False)
    text = printable(text, keep="\n", how=_json_escape)
    if codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8":
        text = _NOT_ASCII.sub(lambda match: _json_escape(match[0]), text)
    print(text)


def _json_escape(character: str) -> str:
    """Escape a character for JSON; write a lone surrogate (from invalid UTF-8) as text."""
    if "\ud800" <= character <= "\udfff":
        return f"\\{escape(character)}"
    import json

    return json.dumps(character)[1:-1]


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the current step: live on a terminal, otherwise as lines."""
    if debugging():
        from onecopy.cli.debug import step

        yield step
        return
    if not sys.stderr.isatty():
        yield lambda text: print_line(f"onecopy: {text}", sys.stderr)
        return
    from rich.console import Console
    from rich.text import Text

    from onecopy.images.skipped import SKIPPED

    # A rich Text, because rich interprets markup such as [link=...] in a string.
    with Console(file=as_it_is(sys.stderr)).status(Text("...")) as status:

        def tell(text: str) -> None:
            shown = printable(text)
            status.update(Text(shown))
            if text.startswith(SKIPPED):
                # These lines stay on the screen.
                status.console.print(Text(f"onecopy: {shown}"))

        yield tell


def each_of(items: Iterable[_T], work: Callable[[_T], object]) -> int:
    """Call ``work`` for each item, even if others fail.

    Errors are printed as they occur.

    Returns:
        The exit code of the first error; 0 if there is none.
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


def debugging() -> bool:
    """Whether --debug is on (cli/debug.py)."""
    return os.environ.get("ONECOPY_DEBUG") == "1"


def show_place(error: Exception) -> None:
    """Print the traceback of an error if the user asked for it (--debug)."""
    if debugging():
        import traceback

        traceback.print_exception(error)


def reasons(guests: Iterable[GuestRecord]) -> list[str]:
    """Return the reasons for the guests' accelerators and for starts by exec, each once."""
    from onecopy.guest.run_directory import REQUESTED
    from onecopy.vmm.accel import in_short

    known = [guest for guest in guests if guest.accel]
    accelerators = {f"{each.accel}: {in_short(each.accel_reason)}" for each in known}
    starts = {each.why_exec for each in known} - {"", REQUESTED}
    return [*sorted(accelerators), *(f"no fork server: {reason}" for reason in sorted(starts))]


def duration(seconds: float) -> str:
    """Format a duration: 0.052 s, 12 s, 3 min, 2 h."""
    if seconds < 10:
        return f"{seconds:.3f} s"
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"
