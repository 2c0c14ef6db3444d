"""One page of the site for each command, from its help."""

from __future__ import annotations

import re
from collections.abc import Iterable

from docgen.help import Help, Option, groups, main_help

#: The directory of the pages, relative to docs/.
PLACE = "reference/commands"


def pages() -> dict[str, str]:
    """Return path -> Markdown of the index and of each command."""
    found = {f"{PLACE}/index.md": _index()}
    for commands in groups().values():
        for each in commands:
            found[f"{PLACE}/{_file(each)}"] = _page(each)
    return found


def navigation() -> list[dict[str, object]]:
    """Return the entries of the navigation, by the headings of ``onecopy --help``."""
    entries: list[dict[str, object]] = [{"All commands": f"{PLACE}/index.md"}]
    for title, commands in groups().items():
        entries.append({title: [{_short(e): f"{PLACE}/{_file(e)}"} for e in commands]})
    return entries


def _file(each: Help) -> str:
    return f"{_short(each)}.md"


def _short(each: Help) -> str:
    return each.path.partition(" ")[2]


def _index() -> str:
    top = main_help()
    lines = ["# Commands", "", top.summary, "", f"    onecopy {top.usage}", ""]
    lines += _option_table(top.options)
    lines += ["Exit codes are the same for [all commands](../exit-codes.md).", ""]
    for title, commands in groups().items():
        lines += [f"## {title}", "", "| Command | Effect |", "|---|---|"]
        lines += [f"| [{_short(e)}]({_file(e)}) | {cell(e.summary)} |" for e in commands]
        lines.append("")
    return "\n".join(lines)


def _page(command: Help) -> str:
    lines = [f"# {command.path}", ""]
    for each in command.all():
        if each is not command:
            lines += [f"## {each.path}", ""]
        lines += [*_paragraphs(each.text), f"    {each.path} {each.usage}", ""]
        titles = dict.fromkeys(option.group for option in each.options)
        for title in titles:
            lines += [f"**{title}**", ""] if title != "Options" else []
            lines += _option_table(o for o in each.options if o.group == title)
        if each.examples:
            lines += ["**Examples**", ""]
            for line, what in each.examples:
                lines += [f"    # {what}", f"    {line}", ""]
    return "\n".join(lines)


def _paragraphs(text: Iterable[str]) -> list[str]:
    lines: list[str] = []
    for each in text:
        if each.startswith("\b\n"):
            lines += [f"    {line}" for line in each.splitlines()[1:]] + [""]
        else:
            lines += [prose(" ".join(each.split())), ""]
    return lines


def _option_table(options: Iterable[Option]) -> list[str]:
    rows = [f"| `{option.syntax}` | {cell(option.text)} |" for option in options]
    return ["| Option | Effect |", "|---|---|", *rows, ""] if rows else []


def cell(text: str) -> str:
    """Return text of the help as Markdown for a cell of a table."""
    return prose(" ".join(text.split()))


def prose(text: str) -> str:
    """Return text of the help as Markdown: options as code, special characters escaped."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else _quote(part) for part in parts)


def _quote(text: str) -> str:
    escaped = re.sub(r"([*_\[\]|])", r"\\\1", text).replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"(?<![\w-])(--?[a-z][\w-]*)", r"`\1`", escaped)
