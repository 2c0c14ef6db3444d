"""onecopy write"""

from __future__ import annotations

from functools import partial

import click

from onecopy.cli import streams
from onecopy.cli.commands import Command
from onecopy.cli.params import ReferenceType, SizeType
from onecopy.model import Reference


@click.command(
    "write",
    cls=Command,
    examples=[
        ("date | onecopy write board", "Write the date at the start of the SC range."),
        ("onecopy write board --offset 4K --range 1 <table.bin", "Write to the second range."),
    ],
)
@click.argument("name", type=ReferenceType("segment"))
@click.option(
    "--offset",
    type=SizeType(),
    default="0",
    show_default=True,
    help="Position in the range to write at, in bytes (4K, 1M).",
)
@click.option(
    "--range",
    "number",
    type=click.IntRange(0, 1000),
    metavar="N",
    help="Number of the range, from 0; required if several ranges are SC.",
)
def command(name: Reference, offset: int, number: int | None) -> None:
    """Write standard input to an SC range of a segment.

    All guests that map the range see the change at once. The content stays until the segment is
    removed.
    """
    from onecopy.guest.segments.live_write import write
    from onecopy.store import Store

    parts = iter(partial(streams.take, 1 << 20), b"")
    count = write(Store(), name, parts, offset=offset, number=number)
    print(f"{count} bytes written")
