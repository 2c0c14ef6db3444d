"""onecopy commit"""

from __future__ import annotations

import click

from onecopy.cli.commands import Command
from onecopy.cli.event_loop import asyncio
from onecopy.cli.output import duration, progress
from onecopy.cli.params import GuestType, LoadedType, ReferenceType
from onecopy.model import Reference, format_size


@click.command(
    "commit",
    cls=Command,
    examples=[
        ("onecopy commit web notes", "Replace the version that the guest web loaded."),
        ("onecopy commit web notes --as notes:2", "Store the changes as notes:2."),
    ],
)
@click.argument("guest", type=GuestType())
@click.argument("segment", type=LoadedType(), metavar="SEGMENT")
@click.option(
    "--as",
    "target",
    type=ReferenceType("segment"),
    metavar="NAME:VERSION",
    help="Name of the new version, which must be free. Default: the name it was loaded by.",
)
def command(guest: str, segment: str, target: Reference | None) -> None:
    """Store a guest's changes to a segment as its new version.

    The segment must be of class EW, or attached with --exclusive. The guest is paused while its
    pages are copied. Guests that use the old version keep it. The command ends when the new version
    is on disk and was read back.
    """
    from onecopy.guest.runtime import Runtime
    from onecopy.guest.segments.commit import commit

    with progress() as tell:
        done = asyncio.run(commit(Runtime.open(), guest, segment, target, progress=tell))
    print(f"{done.artifact.ref} {done.artifact.digest}")
    print(f"{format_size(done.written)} written by {guest}, paused for {duration(done.pause)}")
