"""Text of others is shown, and never obeyed: the function, and all that commands print with."""

from __future__ import annotations

import io
import json
import sys

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from onecopy import cli
from onecopy.cli import output, tables
from onecopy.cli.commands import Main
from onecopy.errors import AgentFailed, CommandFailed, GuestFailed, OnecopyError
from onecopy.images.skipped import SKIPPED
from onecopy.printable import printable

#: A title, a colour, C1's CSI, a turned text, what cannot be seen, a byte that is no UTF-8, markup.
HOSTILE = (
    "\x1b]0;t\x07\x1b[31m\x9b2J\x7f\x08\r\u202egpj\u2066\u200b\ufeff\U000e0041\udcff\ud800[red]x"
)
#: No character of it may come through.
NEVER = set("\x1b\x07\x9b\x7f\x08\r\u202e\u2066\u200b\ufeff\U000e0041\udcff\ud800")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [x] ~", "plain [x] ~"),
        ("Zoë 東京 😀", "Zoë 東京 😀"),
        ("\x1b[0m\x9b\x7f\0", r"\x1b[0m\x9b\x7f\x00"),
        ("a\u202eb\u2067", r"a\u202eb\u2067"),
        ("\u200b\u200d\u2060\ufeff\u00ad\u2028", r"\u200b\u200d\u2060\ufeff\xad\u2028"),
        ("\u3164\ufe0f\U000e0020", r"\u3164\ufe0f\U000e0020"),
        (b"\xff\xc3".decode(errors="surrogateescape"), r"\xff\xc3"),
        ("\ud83d", r"\ud83d"),
        ("a\nb\tc", r"a\x0ab\x09c"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_what_the_caller_keeps() -> None:
    assert printable("a\nb\tc\x1b", keep="\n\t") == "a\nb\tc\\x1b"


@given(st.text(st.characters(codec=None)))
def test_nothing_else_comes_through(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable() and printable(shown) == shown
    shown.encode()


@given(st.text(st.characters(codec=None)))
def test_json_is_json_and_shows_nothing_either(text: str) -> None:
    stream = io.StringIO()
    before, sys.stdout = sys.stdout, stream
    try:
        output.print_json({text: [text]})
    finally:
        sys.stdout = before
    printed = stream.getvalue()
    assert printed.replace("\n", "").isprintable()
    # As other programs have it, which take no half pairs.
    stream.getvalue().encode()
    expected = "".join(printable(c) if "\ud800" <= c <= "\udfff" else c for c in text)
    assert json.loads(printed) == {expected: [expected]}


class Terminal(io.StringIO):
    """Standard output or error on a terminal."""

    def isatty(self) -> bool:
        return True


class Streams:
    """Standard output and error in a test's place; nothing hostile may have come through."""

    def __init__(self, kind: type[io.StringIO], patch: pytest.MonkeyPatch) -> None:
        self.out, self.err = kind(), kind()
        patch.setattr(sys, "stdout", self.out)
        patch.setattr(sys, "stderr", self.err)

    def check(self) -> tuple[str, str]:
        told = self.out.getvalue(), self.err.getvalue()
        assert (sys.stdout, sys.stderr) == (self.out, self.err)
        for each in told:
            assert not NEVER & set(_without_ours(each)), each
        return told


both_kinds = pytest.mark.parametrize("kind", [io.StringIO, Terminal])


def _without_ours(drawn: str) -> str:
    """What rich itself draws a line with, that shows progress."""
    for code in ("\x1b[2K", "\x1b[1A", "\x1b[?25l", "\x1b[?25h", "\x1b[32m", "\x1b[0m", "\r"):
        drawn = drawn.replace(code, "")
    return drawn


@both_kinds
def test_whatever_a_command_prints(
    kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also who knows nothing of this, in whatever way it prints."""
    streams = Streams(kind, monkeypatch)

    @click.command("hostile")
    def hostile() -> None:
        print(HOSTILE)
        print(HOSTILE, file=sys.stderr)
        click.echo(HOSTILE)
        click.echo(HOSTILE, err=True)
        sys.stdout.write(HOSTILE)
        sys.stderr.writelines([HOSTILE])
        output.print_line(HOSTILE + "\nmore")
        tables.print_table([HOSTILE], [[HOSTILE], ["a\nb"]])
        output.print_json([HOSTILE])
        with output.progress() as tell:
            tell(HOSTILE)
            tell("[link=http://evil]a[/link] [red]b")

    monkeypatch.setattr(Main, "get_command", lambda *_: hostile)
    assert cli.main(["hostile"]) == 0
    out, err = streams.check()
    assert "a\\x0ab" in out and "\\x0amore" in out
    # Markup is text.
    assert "[link=http://evil]a[/link] [red]b" in err


@both_kinds
@pytest.mark.parametrize(
    "error",
    [
        GuestFailed("it ended", output=f"{HOSTILE}\n{HOSTILE}"),
        AgentFailed(f"the agent said {HOSTILE}", hint=f"do {HOSTILE}\nonecopy: all is well"),
        CommandFailed(f"tool {HOSTILE}", 1, f"{HOSTILE}\nonecopy: all is well"),
        click.UsageError(HOSTILE),
    ],
)
def test_whatever_fails(
    kind: type[io.StringIO],
    monkeypatch: pytest.MonkeyPatch,
    error: OnecopyError | click.ClickException,
) -> None:
    streams = Streams(kind, monkeypatch)

    @click.command("fails")
    def fails() -> None:
        raise error

    monkeypatch.setattr(Main, "get_command", lambda *_: fails)
    assert cli.main(["fails"]) == error.exit_code
    lines = streams.check()[1].splitlines()
    # Nobody else speaks for us.
    assert not any(line.startswith("onecopy: all is well") for line in lines)


def test_what_is_drawn_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(Terminal, monkeypatch)
    with output.escaping():
        console = Console(file=output.as_it_is(sys.stdout), force_terminal=True)
        console.print(Text(printable("x\x1b]0;t\x07"), style="green"))
    assert streams.out.getvalue() == "\x1b[32mx\\x1b]0;t\\x07\x1b[0m\n"


def test_json_where_output_is_no_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    output.print_json(["é😀\udcff"])
    sys.stdout.flush()
    assert json.loads(raw.getvalue().decode("ascii")) == ["é😀\\xff"]


def test_what_was_skipped_stays_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other steps are replaced by the next."""
    streams = Streams(Terminal, monkeypatch)
    with output.progress() as tell:
        tell("storing it")
        tell(f"{SKIPPED}1 socket")
        tell("done")
    assert "onecopy: skipped: 1 socket\n" in streams.err.getvalue()
    assert "onecopy: storing it" not in streams.err.getvalue()
