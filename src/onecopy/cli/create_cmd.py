"""onecopy create"""

from __future__ import annotations

import click

from onecopy.cli.output import progress
from onecopy.cli.params import ReferenceType, domain_option, new_access
from onecopy.model import Reference, check_new_name, format_size


@click.command("create")
@click.argument("name", type=ReferenceType("segment"))
@click.option(
    "--range",
    "ranges",
    multiple=True,
    required=True,
    metavar="CLASS:SIZE[:FILE]",
    help="A range: page class SR, ER, SW, EW, SN, EN or SC; size, a multiple of 2M; and what it "
    "holds at first (else zeroes). May be repeated.",
)
@domain_option
def command(name: Reference, ranges: tuple[str, ...], domain: str | None) -> None:
    """Make a segment range by range.

    S is one copy for all guests, E one for each; R they read, W they write; N is as W, starts as
    zeroes and is never saved; SC the host writes (`onecopy write`). In guests the ranges are
    /dev/onecopy/NAME, NAME.1 and so on; a file that is an EROFS, ext2 or ext4 image can be mounted.
    """
    from onecopy.images.create import NewRange, create_segment
    from onecopy.store import Store

    check_new_name(name.name)
    wanted = [NewRange.parse(text) for text in ranges]
    with progress() as tell:
        artifact = create_segment(Store(), name, wanted, access=new_access(domain), progress=tell)
    print(f"{artifact.ref} {artifact.digest} {format_size(sum(each.size for each in wanted))}")
