"""onecopy commit"""

from __future__ import annotations

import asyncio

import click

from onecopy.cli.output import duration, progress
from onecopy.cli.params import GuestType, ReferenceType
from onecopy.model import Reference, format_size


@click.command("commit")
@click.argument("guest", type=GuestType())
@click.argument("segment", metavar="SEGMENT")
@click.option(
    "--as",
    "target",
    type=ReferenceType("segment"),
    metavar="NAME:VERSION",
    help="Give the new version this name, which must be free; default: the one it was loaded by.",
)
def command(guest: str, segment: str, target: Reference | None) -> None:
    """Make what a guest has changed in its own copy of a segment (EW) the new version.

    The guest stands still while its pages are copied. Present users keep the old version. Done is
    what is on disk and was read back.
    """
    from onecopy.guest.runtime import Runtime
    from onecopy.guest.segments.commit import commit

    with progress() as tell:
        done = asyncio.run(commit(Runtime.open(), guest, segment, target, progress=tell))
    print(f"{done.artifact.ref} {done.artifact.digest}")
    print(f"{format_size(done.written)} written by {guest}, which stood {duration(done.pause)}")
