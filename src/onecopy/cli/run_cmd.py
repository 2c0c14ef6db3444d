"""onecopy run"""

from __future__ import annotations

import click

from onecopy.cli.commands import Command
from onecopy.cli.params import ReferenceType, program_argument
from onecopy.cli.start_options import (
    BOOT,
    START,
    CloneOptions,
    StartOptions,
    clone_options,
    start_options,
)
from onecopy.model import Reference


@click.command(
    "run",
    cls=Command,
    examples=[
        ("onecopy run --count 4 --name web --publish 8080:80 hello", "Start web-1 to web-4."),
        ("onecopy run hello python3 --version", "Start a clone for one command."),
    ],
    option_groups={START: "Start options", BOOT: "Guest options"},
)
@click.argument("system", type=ReferenceType("system"))
@program_argument()
@start_options
@clone_options
def command(
    system: Reference, program: tuple[str, ...], start: StartOptions, clone: CloneOptions
) -> int:
    """Start guests from a saved system.

    With CMD, run it in each guest, stop the guests when it has ended, and exit with its exit code.
    Options of onecopy stand before SYSTEM. The start fails if a guest cannot get what an option
    requests.
    """
    from onecopy.cli.starting import start_guests

    return start_guests(clone.spec(system, start), start, program)
