"""The docs name only commands and options that exist, and show the examples as they are."""

import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import click
import pytest

from onecopy.cli import onecopy

PROJECT = Path(__file__).parents[3]
PAGES = sorted(
    [
        *(PROJECT / "docs").rglob("*.md"),
        *(PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    ]
)
_INLINE = re.compile(r"`(onecopy [^`\n]+)`")
_TYPED = re.compile(r"^(?: {4}|\$ )(?:\$ )?(onecopy [^\n]*(?:(?<=\\)\n[^\n]*)*)", re.MULTILINE)


def _lines(text: str) -> Iterator[str]:
    yield from _INLINE.findall(text)
    yield from _TYPED.findall(text)


def _fault(line: str) -> str:
    """What is wrong with a command line; nothing if click knows its command and options."""
    words = shlex.split(line.replace("\\\n", " "), comments=True)[1:]
    words = list(takewhile(lambda word: not re.fullmatch(r"[|&;<>]+", word), words))
    command: click.Command = onecopy
    while words and isinstance(command, click.Group) and not words[0].startswith("-"):
        name = words.pop(0)
        if not re.fullmatch(r"[a-z]+", name):
            return ""  # COMMAND stands for any
        found = command.get_command(click.Context(command), name)
        if found is None:
            return f"there is no {name!r}"
        command = found
    try:
        # As below `onecopy`: click keeps the option --help that it made for the first context.
        context = click.Context(command, help_option_names=["-h", "--help"])
        command.make_parser(context).parse_args(words)
    except click.UsageError as error:
        return error.format_message()
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_commands_and_options_exist(page: Path) -> None:
    faults = {line: found for line in _lines(page.read_text()) if (found := _fault(line))}
    assert faults == {}


def test_a_wrong_line_is_found() -> None:
    assert _fault("onecopy ls --json") == ""
    assert "nonsense" in _fault("onecopy nonsense")
    assert "--nonsense" in _fault("onecopy ls --nonsense")
    assert "--nonsense" in _fault("onecopy ksm on --nonsense")
    assert list(_lines("`onecopy ls`\n    onecopy a \\\n  b\n$ onecopy c\n")) == [
        "onecopy ls",
        "onecopy a \\\n  b",
        "onecopy c",
    ]


def test_programs_in_the_docs_are_the_examples() -> None:
    programs = {path.read_text() for path in (PROJECT / "examples").glob("*.py")}
    shown = []
    for page in [PROJECT / "docs/tutorial.md", *(PROJECT / "docs/guides").glob("*.md")]:
        shown += re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(shown) >= 3
    assert set(shown) == programs


def test_the_readme_is_short() -> None:
    assert len((PROJECT / "README.md").read_bytes()) <= 7000
