"""The list of commands, and the classes that show their help.

Commands are imported only when they are used, so that `onecopy --help` is instant. GROUPS has their
one-line helps; a test keeps them equal to those of the commands. Not here: the commands themselves,
and errors of the command line (usage.py).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import click

#: Heading -> command -> its one-line help.
GROUPS = {
    "Images": {
        "build": "Build a segment from packages, files, an archive or a disk image.",
        "create": "Create a segment from ranges of memory.",
        "ls": "List segments, saved systems and kernels.",
        "inspect": "Print all details of a segment, saved system, kernel or guest.",
        "verify": "Check digests and file systems of segments and saved systems.",
        "tag": "Add a name or version to a segment, saved system or kernel.",
        "rm": "Remove segments, saved systems, kernels and ended guests.",
        "grant": "Restrict a segment or saved system to certain guests.",
        "revoke": "Withdraw grants from a segment or saved system.",
        "write": "Write standard input to an SC range of a segment.",
        "preload": "Load segments, systems or kernels into memory in advance.",
    },
    "Guests": {
        "boot": "Boot guests from a root segment or a bare kernel.",
        "run": "Start guests from a saved system.",
        "save": "Save a guest as a system that clones start from.",
        "ps": "List running guests.",
        "exec": "Run a program in a guest.",
        "cp": "Copy files and directories into a guest or out of it.",
        "console": "Connect the terminal to a guest's serial console.",
        "logs": "Print the output of a guest's console or of its QEMU.",
        "stop": "Stop guests.",
        "pool": "Keep guests ready, so that `onecopy run` starts them faster.",
        "disks": "List or remove the disks that guests own.",
    },
    "Segments in guests": {
        "attach": "Load a segment into a running guest.",
        "detach": "Unload a segment from a running guest.",
        "commit": "Store a guest's changes to a segment as its new version.",
    },
    "Memory": {
        "report": "Show the memory of all guests, by the kernel's counters.",
        "top": "Watch the memory and CPU use of guests.",
        "advise": "Find memory that guests could share.",
        "plan": "Estimate the memory and time that clones of a saved system take.",
        "ksm": "Control KSM, the kernel's merging of equal pages.",
    },
    "Host": {
        "doctor": "Check what this host supports.",
        "serve": "Serve guests that request segments by name.",
        "demo": "Build, save, boot and clone guests, and compare their cost.",
        "completion": "Print the completion script for a shell.",
    },
}
COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items()}
#: Seconds: the upper limit of times, which the help does not show.
_YEAR = 366 * 86400
Examples = Sequence[tuple[str, str]]


class Command(click.Command):
    """A command whose help ends with examples; its options stop where a guest's command begins."""

    def __init__(
        self,
        *args: Any,
        examples: Examples,
        option_groups: Mapping[str, str] | None = None,
        **attrs: Any,
    ) -> None:
        """Make a command.

        Args:
            args: Arguments of click.Command.
            examples: Pairs of a command line and its description.
            option_groups: Group of options (`Option`) -> its title in the help, in order; options
                without a group come first.
            attrs: Keyword arguments of click.Command.
        """
        super().__init__(*args, **attrs)
        self.examples = tuple(examples)
        self._option_groups = option_groups or {}
        # Words after the first argument belong to the guest's program.
        if any(param.type is click.UNPROCESSED for param in self.params):
            self.allow_interspersed_args = False

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, those of each group under its title."""
        help_ = self.get_help_option(ctx)
        for group, title in {"": "Options", **self._option_groups}.items():
            params = [p for p in self.params if _is_option(p) and self._group(p) == group]
            if help_ and not group:
                params.append(help_)
            records = (param.get_help_record(ctx) for param in params)
            found = [(names, _plain_range(text)) for names, text in filter(None, records)]
            if found:
                with formatter.section(title):
                    formatter.write_dl(found)

    def _group(self, param: click.Parameter) -> str:
        group = getattr(param, "group", "")
        return group if group in self._option_groups else ""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, each under what it does."""
        write_examples(formatter, self.examples)


def _is_option(param: click.Parameter) -> bool:
    return isinstance(param, click.Option)


def _plain_range(text: str) -> str:
    """Put a range in words; click shows it as 1<=x<=64."""
    text = text.replace(f"<=x<={_YEAR}]", " or more]")
    return re.sub(r"([\d.]+)<=x<=([\d.]+)", r"\1 to \2", text)


class Option(click.Option):
    """An option that the help shows in a ``group`` of its own."""

    def __init__(self, *args: Any, group: str = "", **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.group = group


class Group(click.Group):
    """A command with subcommands, which are made with ``Command`` as well."""

    def __init__(self, *args: Any, examples: Examples = (), **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, each under what it does."""
        write_examples(formatter, self.examples)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that ``args`` begin with; a wrong one gets a suggestion."""
        from onecopy.cli.suggest import no_command

        name = args[0]
        wrong = not name.startswith("-") and self.get_command(ctx, name) is None
        if wrong and not ctx.resilient_parsing:
            raise no_command(name, ctx.command_path, self.list_commands(ctx))
        return super().resolve_command(ctx, args)


class Main(Group):
    """Loads a command's file when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"onecopy.cli.{cmd_name}_cmd")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by group, all texts in one column."""
        width = max(map(len, COMMANDS))
        for title, commands in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), text) for name, text in commands.items()])


def write_examples(formatter: click.HelpFormatter, examples: Examples) -> None:
    """Write each example under its description."""
    with formatter.section("Examples"):
        for number, (line, what) in enumerate(examples):
            if number:
                formatter.write_paragraph()
            formatter.write_text(f"# {what}")
            # Not wrapped: readers copy it.
            formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
