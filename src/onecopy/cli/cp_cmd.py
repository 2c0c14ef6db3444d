"""onecopy cp"""

import asyncio
import re

import click

from onecopy.cli.params import SizeType
from onecopy.errors import InvalidInput
from onecopy.model import require_text

_IN_GUEST = re.compile(r"([a-z0-9][a-z0-9-]*):(.*)", re.DOTALL)


@click.command("cp")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option(
    "--max-size",
    type=SizeType(),
    default="16G",
    show_default=True,
    help="Stop when what comes out of a guest is larger, with 512 bytes for each file.",
)
@click.option(
    "--max-files",
    type=click.IntRange(1, 10**9),
    default=1_000_000,
    show_default=True,
    metavar="N",
    help="Stop when it has more files, folders and links.",
)
def command(source: str, target: str, max_size: int, max_files: int) -> None:
    """Copy files and folders into a guest, or out of it; one of the two is GUEST:PATH.

    As cp(1) does: into DST if that is a folder, else under that name. A file that is there is
    replaced, a folder never. Modes and times are kept. Needs nothing in the image. A file of the
    host whose name has a colon is ./NAME.
    """
    from onecopy.guest.runtime import Runtime
    from onecopy.guest.transfer.copy import copy_in, copy_out
    from onecopy.guest.transfer.tar import Limits

    there, here = _IN_GUEST.fullmatch(source), _IN_GUEST.fullmatch(target)
    if bool(there) == bool(here):
        raise InvalidInput(
            "one of the two has to be in a guest, and only one",
            hint="write GUEST:PATH for it, for example onecopy cp web-1:/var/log logs",
        )
    host = Runtime.open()
    if there:
        folder = host.guest_with_agent(there[1]).path
        limits = Limits(max_size, max_files)
        asyncio.run(copy_out(folder, require_text(there[2]), target, limits))
    elif here:
        folder = host.guest_with_agent(here[1]).path
        asyncio.run(copy_in(folder, source, require_text(here[2])))
