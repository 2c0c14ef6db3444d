"""Manual pages in roff(7), with the macros of man(7), from the help of the commands."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from docgen.exit_codes import rows
from docgen.help import Help, Option, groups, main_help
from onecopy import __version__

_EXEC_CODES = (
    "exec and run with a command exit with the code of the program in the guest. They exit with "
    "125 if onecopy itself fails."
)


def write_all(directory: Path) -> list[Path]:
    """Write onecopy.1 and a page for each command and subcommand; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    top, commands = main_help(), groups()
    pages = {"onecopy": _main_page(top, commands)}
    every = [each for found in commands.values() for command in found for each in command.all()]
    for each in every:
        pages[each.name] = render(each)
    paths = []
    for name, text in pages.items():
        path = directory / f"{name}.1"
        path.write_text(text)
        paths.append(path)
    return paths


def _main_page(top: Help, commands: dict[str, list[Help]]) -> str:
    lines = [*_head(top), ".SH DESCRIPTION", *_paragraphs(top.text), ".SH COMMANDS"]
    for title, found in commands.items():
        lines.append(f".SS {roff(title)}")
        for each in found:
            lines += [".TP", f".BR {roff(each.name)} (1)", roff(each.summary)]
    lines += [".SH OPTIONS", *_options(top.options), ".SH EXIT STATUS"]
    for code, _, text in rows():
        lines += [".TP", f".B {code}", roff(text)]
    lines += [".P", roff(_EXEC_CODES), ".SH ENVIRONMENT", ".TP", ".B ONECOPY_HOME"]
    lines += ["The directory of the store. Default: /var/lib/onecopy for root, else the directory"]
    lines += ["onecopy below $XDG_DATA_HOME.", ".TP", ".B ONECOPY_DEBUG"]
    lines += ["With the value 1 it has the effect of \\-\\-debug.", ""]
    return "\n".join(lines)


def render(command: Help) -> str:
    """Return the manual page of one command."""
    lines = [*_head(command), ".SH DESCRIPTION", *_paragraphs(command.text)]
    for title in dict.fromkeys(option.group for option in command.options):
        lines.append(".SH OPTIONS" if title == "Options" else f".SS {roff(title)}")
        lines += _options(o for o in command.options if o.group == title)
    if command.subcommands:
        lines.append(".SH COMMANDS")
        for each in command.subcommands:
            lines += [".TP", f".BR {roff(each.name)} (1)", roff(each.summary)]
    if command.examples:
        lines.append(".SH EXAMPLES")
        for line, what in command.examples:
            lines += [".TP", roff(what), ".EX", roff(line), ".EE"]
    return "\n".join([*lines, ".SH SEE ALSO", ".BR onecopy (1)", ""])


def _head(command: Help) -> list[str]:
    summary = roff(command.summary.removesuffix("."))
    return [
        f'.TH {roff(command.name.upper())} 1 "" "onecopy {__version__}" "onecopy"',
        ".SH NAME",
        f"{roff(command.name)} \\- {summary}",
        ".SH SYNOPSIS",
        f".B {roff(command.path)}",
        roff(command.usage),
    ]


def _paragraphs(text: Iterable[str]) -> list[str]:
    lines: list[str] = []
    for each in text:
        if each.startswith("\b\n"):
            lines += [".PP", ".EX", *map(roff, each.splitlines()[1:]), ".EE"]
        else:
            lines += [".PP", roff(" ".join(each.split()))]
    return lines


def _options(options: Iterable[Option]) -> list[str]:
    lines = []
    for option in options:
        lines += [".TP", f".B {roff(option.syntax)}", roff(" ".join(option.text.split()))]
    return lines


def roff(text: str) -> str:
    """Escape text for roff, with bold for text in backticks."""
    shown = (
        text.replace("\\", "\\e").replace("-", "\\-").replace("~", "\\(ti").replace("^", "\\(ha")
    )
    shown = re.sub(r"`([^`]*)`", r"\\fB\1\\fR", shown)
    return re.sub(r"^([.'])", r"\\&\1", shown)
