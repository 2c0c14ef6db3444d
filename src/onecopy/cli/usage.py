"""Turns click's exceptions for a wrong command line into OnecopyErrors.

Not here: wrong commands (suggest.py), values that onecopy's own types reject (params.py).
"""

from __future__ import annotations

import click
from click.exceptions import BadParameter, MissingParameter, NoSuchOption, UsageError

from onecopy.cli import suggest
from onecopy.errors import InvalidInput, OnecopyError, did_you_mean


def explained(error: click.ClickException) -> OnecopyError:
    """Return the OnecopyError for an exception of click."""
    context = error.ctx if isinstance(error, UsageError) else None
    text = _sentence(error.format_message())
    if context is None:
        return InvalidInput(text, hint="`onecopy --help` lists the commands")
    help_ = f"`{context.command_path} --help`"
    if isinstance(error, NoSuchOption):
        return _no_option(error, context)
    if isinstance(error, BadParameter) and error.param and not isinstance(error, MissingParameter):
        return InvalidInput(text, hint=f"{help_} describes {error.param.get_error_hint(context)}")
    return InvalidInput(text, hint=f"write {_usage(context)}; {help_} explains it")


def _no_option(error: NoSuchOption, context: click.Context) -> OnecopyError:
    options = [name for param in context.command.params for name in param.opts]
    found = suggest.near(error.option_name, [name for name in options if name[:1] == "-"], 0.7)
    others = _commands_with(error.option_name, context.find_root())
    if found:
        hint = did_you_mean(found)
    elif others:
        hint = f"{' and '.join(f'`onecopy {name}`' for name in others)} have it; "
        hint = hint if len(others) > 1 else hint.replace(" have ", " has ")
    else:
        hint = "write -- before an argument that begins with -; "
    return InvalidInput(
        f"{context.command_path} has no option {error.option_name}",
        hint=f"{hint}`{context.command_path} --help` lists the options",
    )


def _commands_with(option: str, root: click.Context) -> list[str]:
    """Return the names of commands that start guests and have this option."""
    group = root.command
    if not isinstance(group, click.Group):
        return []
    commands = {name: group.get_command(root, name) for name in ("boot", "run")}
    return [
        name
        for name, command in commands.items()
        if command and any(option in param.opts for param in command.params)
    ]


def _usage(context: click.Context) -> str:
    pieces = context.command.collect_usage_pieces(context)
    return " ".join([context.command_path, *pieces])


def _sentence(text: str) -> str:
    """Return a message of click in onecopy's form: one line, no capital, no full stop."""
    # click puts each choice on a line of its own.
    text = " ".join(text.split()).removesuffix(".")
    return text[:1].lower() + text[1:]
