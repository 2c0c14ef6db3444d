"""onecopy boot"""

from __future__ import annotations

import click

from onecopy.cli.commands import Command
from onecopy.cli.params import ReferenceType, program_argument
from onecopy.cli.start_options import (
    BOOT,
    START,
    BootOptions,
    StartOptions,
    boot_options,
    start_options,
)
from onecopy.model import Reference


@click.command(
    "boot",
    cls=Command,
    examples=[
        ("onecopy boot --name web --publish 8080:80 nginx", "Boot a root segment."),
        ("onecopy boot python python3 --version", "Boot a guest for one command."),
    ],
    option_groups={START: "Start options", BOOT: "Guest options"},
)
@click.argument("segment", type=ReferenceType())
@program_argument()
@start_options
@boot_options
def command(
    segment: Reference, program: tuple[str, ...], start: StartOptions, boot: BootOptions
) -> int:
    """Boot guests from a root segment or a bare kernel.

    With CMD, run it in each guest, stop the guests when it has ended, and exit with its exit code.
    Options of onecopy stand before SEGMENT.
    """
    from msgspec.structs import replace

    from onecopy.cli.starting import start_guests

    # What is run in it by `exec` is a reason to be up.
    spec = replace(boot.spec(segment, start), idle=bool(program))
    return start_guests(spec, start, program)
