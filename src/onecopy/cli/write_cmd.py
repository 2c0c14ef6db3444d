"""onecopy write"""

from __future__ import annotations

from functools import partial

import click

from onecopy.cli import streams
from onecopy.cli.params import ReferenceType, SizeType
from onecopy.model import Reference


@click.command("write")
@click.argument("name", type=ReferenceType("segment"))
@click.option(
    "--offset", type=SizeType(), default="0", show_default=True, help="Where in the range to begin."
)
@click.option(
    "--range",
    "number",
    type=click.IntRange(0, 1000),
    help="Number of the range, if several are SC.",
)
def command(name: Reference, offset: int, number: int | None) -> None:
    """Write standard input to an SC range of a segment; all guests see it at once.

    What is written stays until the segment goes.
    """
    from onecopy.guest.segments.live_write import write
    from onecopy.store import Store

    parts = iter(partial(streams.take, 1 << 20), b"")
    count = write(Store(), name, parts, offset=offset, number=number)
    print(f"{count} bytes written")
