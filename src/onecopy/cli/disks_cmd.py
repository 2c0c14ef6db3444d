"""onecopy disks"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from onecopy.cli.commands import Command
from onecopy.cli.listing import Listing, Row, listing_options, print_list
from onecopy.cli.output import each_of
from onecopy.cli.params import OwnDiskType
from onecopy.cli.tables import print_table
from onecopy.model import format_size

if TYPE_CHECKING:
    from onecopy.guest.runtime import Runtime


@click.command(
    "disks",
    cls=Command,
    examples=[
        ("onecopy disks", "List all disks that guests own."),
        ("onecopy disks --rm db", "Remove the disk of the guest db, with its content."),
    ],
)
@click.option(
    "--rm",
    "names",
    multiple=True,
    type=OwnDiskType(),
    metavar="NAME",
    help="Remove the disk of guest NAME with its content; no guest may use it. May be repeated.",
)
@listing_options
def command(names: tuple[str, ...], listing: Listing) -> int:
    """List or remove the disks that guests own.

    `--disk SIZE` of `onecopy run` and `onecopy boot` creates such a disk; a guest of the same name
    finds it again. ALLOCATED is the space that the disk takes on the host.
    """
    import msgspec

    from onecopy.guest.lifecycle.disks import OwnDisk, list_own_disks
    from onecopy.guest.runtime import Runtime

    host = Runtime.open()
    if names:
        return each_of(names, lambda name: _remove(host, name))
    print_list(
        listing,
        msgspec.to_builtins(list_own_disks(host)),
        OwnDisk.__struct_fields__,
        table=_print,
    )
    return 0


def _print(rows: Sequence[Row]) -> None:
    print_table(
        ["NAME", "SIZE", "ALLOCATED", "USED BY"],
        [
            [
                row["name"],
                format_size(row["size"]),
                format_size(row["allocated"]),
                row["guest"] or "-",
            ]
            for row in rows
        ],
    )


def _remove(host: Runtime, name: str) -> None:
    from onecopy.guest.lifecycle.disks import remove

    remove(host, name)
    print(f"the disk of {name} is removed")
