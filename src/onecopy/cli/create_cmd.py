"""onecopy create"""

from __future__ import annotations

import click

from onecopy.cli.commands import Command
from onecopy.cli.output import progress
from onecopy.cli.params import RangeType, ReferenceType, domain_option, new_access
from onecopy.model import Reference, check_new_name, format_size


@click.command(
    "create",
    cls=Command,
    examples=[
        ("onecopy create board --range SC:2M", "Create memory that the host writes."),
        (
            "onecopy create data --range SR:64M:data.img --range EN:128M",
            "Create a shared image and a scratch range for each guest.",
        ),
    ],
)
@click.argument("name", type=ReferenceType("segment"))
@click.option(
    "--range",
    "ranges",
    multiple=True,
    type=RangeType(),
    required=True,
    metavar="CLASS:SIZE[:FILE]",
    help="Add a range of a page class (SR, ER, SW, EW, SN, EN or SC). SIZE is a multiple of 2M. "
    "The range holds FILE, or zeroes. May be repeated.",
)
@domain_option
def command(name: Reference, ranges: tuple[str, ...], domain: str | None) -> None:
    """Create a segment from ranges of memory.

    The first letter of a page class: S is one copy for all guests, E is one copy for each guest.
    The second letter: guests read R, write W, and write N, which starts as zeroes and is never
    saved. In SC, the host writes (`onecopy write`) and guests read.

    In guests the ranges are /dev/onecopy/NAME, NAME.1 and so on. A guest can mount a range whose
    FILE is an EROFS, ext2 or ext4 image.
    """
    from onecopy.images.create import NewRange, create_segment
    from onecopy.store import Store

    check_new_name(name.name)
    wanted = [NewRange.parse(text) for text in ranges]
    with progress() as tell:
        artifact = create_segment(Store(), name, wanted, access=new_access(domain), progress=tell)
    print(f"{artifact.ref} {artifact.digest} {format_size(sum(each.size for each in wanted))}")
