"""Help as users read it: golden files, examples that parse, one-line helps.

`ONECOPY_REGENERATE=1 pytest tests/unit/cli/test_help.py` makes tests/unit/data/help anew.
"""

import os
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from onecopy import cli
from onecopy.cli.commands import COMMANDS, GROUPS, Command, Group

HELP = Path(__file__).parents[1] / "data/help"
#: Columns of the terminal: as wide as help gets.
WIDTH = 100


def _commands() -> Iterator[tuple[tuple[str, ...], Command | Group]]:
    """(words, command) of onecopy itself, its commands, and theirs."""
    yield (), cli.onecopy
    for name in COMMANDS:
        command = cli.onecopy.get_command(click.Context(cli.onecopy), name)
        assert isinstance(command, Command | Group), name
        yield (name,), command
        if isinstance(command, Group):
            for inner in command.commands.values():
                assert isinstance(inner, Command), inner.name
                yield (name, str(inner.name)), inner


ALL = dict(_commands())
named = pytest.mark.parametrize("words", ALL, ids=lambda words: " ".join(words) or "onecopy")


def _help(words: tuple[str, ...]) -> str:
    context = click.Context(cli.onecopy, info_name="onecopy", terminal_width=WIDTH)
    context.help_option_names = ["-h", "--help"]
    if words:
        for word in words[:-1]:
            context = click.Context(ALL[(word,)], context, word)
        context = click.Context(ALL[words], context, words[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return context.command.get_help(context) + "\n"


@named
def test_the_help_is_as_recorded(words: tuple[str, ...]) -> None:
    path = HELP / f"{'-'.join(words) or 'onecopy'}.txt"
    found = _help(words)
    if os.environ.get("ONECOPY_REGENERATE") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert found == path.read_text()


def test_no_record_is_left_of_a_command_that_went() -> None:
    assert {path.stem for path in HELP.iterdir()} == {"-".join(w) or "onecopy" for w in ALL}


@named
def test_examples_are_command_lines(words: tuple[str, ...]) -> None:
    """Each example is parsed as it would be: commands, options, values. None is run."""
    command = ALL[words]
    assert len(command.examples) >= 2
    own = 0
    for line, what in command.examples:
        assert what[0].isupper() and what.endswith("."), what
        for part in re.split(r"\$\(|\||;|&&", line):
            typed = [word for word in shlex.split(part.replace('"', "")) if word]
            if "onecopy" not in typed:
                continue
            args = [word.rstrip(")") for word in typed[typed.index("onecopy") + 1 :]]
            # What follows is the shell's.
            end = next((i for i, word in enumerate(args) if word[0] in "<>"), len(args))
            used, rest = _resolved(args[:end])
            ALL[used].make_context(used[-1], rest, parent=click.Context(cli.onecopy))
            own += used == words or not words
    assert own, f"no example is of {words}"


def _resolved(args: list[str]) -> tuple[tuple[str, ...], list[str]]:
    words = tuple(args[:2])
    words = words if words in ALL else words[:1]
    return words, args[len(words) :]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_one_line_help_is_the_command_s_own(name: str) -> None:
    command = ALL[(name,)]
    assert command.name == name
    assert command.get_short_help_str(limit=1000) == COMMANDS[name]
    # It is one line on a terminal of 80 columns.
    assert len(COMMANDS[name]) <= 80 - len("  completion  ")


def test_every_file_of_a_command_is_listed() -> None:
    files = Path(cli.__file__).parent.glob("[a-z]*_cmd.py")
    assert {file.stem.removesuffix("_cmd") for file in files} == set(COMMANDS)
    assert sum(map(len, GROUPS.values())) == len(COMMANDS)


@named
def test_each_option_has_a_help_of_sentences(words: tuple[str, ...]) -> None:
    for param in ALL[words].params:
        if isinstance(param, click.Option):
            assert param.help, param.opts
            assert param.help[0].isupper() or param.help.startswith("vCPUs"), param.help
            assert param.help.endswith((".", ")")), param.help


@named
def test_a_default_that_is_shown_is_so(words: tuple[str, ...]) -> None:
    """A default in square brackets is what the command gets; one in words has no such."""
    for param in ALL[words].params:
        if isinstance(param, click.Option) and param.show_default:
            assert param.default is not None, param.opts
            assert "Default:" not in (param.help or ""), param.opts
