"""Reads the help of every command from click: one value for each command.

Not here: formatting the help (command_pages.py, man.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import click

from onecopy.cli import onecopy
from onecopy.cli.commands import GROUPS, Command, Group


@dataclass(frozen=True)
class Option:
    """One option: its syntax, its effect, and its group in the help."""

    syntax: str
    text: str
    group: str


@dataclass(frozen=True)
class Help:
    """The help of one command or subcommand.

    Attributes:
        path: The words of the command line, ``onecopy ksm on``.
        usage: The syntax after these words.
        summary: The first sentence.
        text: All paragraphs; those that click does not wrap begin with ``\\b`` and a line end.
        examples: Pairs of a command line and its description.
        subcommands: The help of the subcommands.
    """

    path: str
    usage: str
    summary: str
    text: tuple[str, ...]
    options: tuple[Option, ...]
    examples: tuple[tuple[str, str], ...] = ()
    subcommands: tuple[Help, ...] = field(default=())

    @property
    def name(self) -> str:
        """The words joined by hyphens: the name of the manual page."""
        return self.path.replace(" ", "-")

    def all(self) -> Iterator[Help]:
        """Yield this command and its subcommands."""
        yield self
        for each in self.subcommands:
            yield from each.all()


def groups() -> dict[str, list[Help]]:
    """Return the help of all commands, by the headings of ``onecopy --help``."""
    root = _context(onecopy, None)
    return {
        title: [_help(_command(onecopy, root, name), root) for name in commands]
        for title, commands in GROUPS.items()
    }


def main_help() -> Help:
    """Return the help of ``onecopy`` itself, without its commands."""
    return _help(onecopy, None, deep=False)


def _context(command: click.Command, parent: click.Context | None) -> click.Context:
    # Without colours, and with metavars as the terminal shows them.
    settings = command.context_settings
    return click.Context(command, parent=parent, info_name=command.name, color=False, **settings)


def _command(group: click.Group, context: click.Context, name: str) -> click.Command:
    found = group.get_command(context, name)
    assert found is not None, name
    return found


def _help(command: click.Command, parent: click.Context | None, *, deep: bool = True) -> Help:
    context = _context(command, parent)
    text = inspect.cleandoc((command.help or "").partition("\f")[0])
    subcommands: list[Help] = []
    if deep and isinstance(command, click.Group):
        subcommands = [
            _help(_command(command, context, name), context)
            for name in command.list_commands(context)
        ]
    return Help(
        path=context.command_path,
        usage=" ".join(command.collect_usage_pieces(context)),
        summary=" ".join(text.partition("\n\n")[0].split()),
        text=tuple(text.split("\n\n")),
        options=tuple(_options(command, context)),
        examples=command.examples if isinstance(command, Command | Group) else (),
        subcommands=tuple(subcommands),
    )


def _options(command: click.Command, context: click.Context) -> Iterator[Option]:
    shown = _Record()
    command.format_options(context, shown)
    for title, rows in shown.sections:
        # A group also writes its commands, which have pages of their own. All have --help.
        if title != "Commands" and title not in GROUPS:
            options = [Option(names, text, title) for names, text in rows if text]
            yield from (o for o in options if not context.parent or "--help" not in o.syntax)


class _Record(click.HelpFormatter):
    """Records the sections of a command's help: their titles and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[tuple[str, list[tuple[str, str]]]] = []

    def write_heading(self, heading: str) -> None:
        """Begin a section."""
        self.sections.append((heading, []))

    def write_dl(
        self, rows: Iterable[tuple[str, str | None]], col_max: int = 30, col_spacing: int = 2
    ) -> None:
        """Add rows to the section."""
        self.sections[-1][1].extend((names, text or "") for names, text in rows)
