"""onecopy cp"""

import click

from onecopy.cli.commands import Command
from onecopy.cli.event_loop import asyncio
from onecopy.cli.params import CopyType, SizeType
from onecopy.errors import InvalidInput
from onecopy.model import require_text


@click.command(
    "cp",
    cls=Command,
    examples=[
        ("onecopy cp site web:/srv", "Copy a directory into the guest web."),
        ("onecopy cp web:/var/log/syslog .", "Copy a file out of it."),
    ],
)
@click.argument("source", type=CopyType(), metavar="SOURCE")
@click.argument("target", type=CopyType(), metavar="TARGET")
@click.option(
    "--max-size",
    type=SizeType(),
    default="16G",
    show_default=True,
    help="Fail if a copy out of a guest is larger, in bytes; each file counts 512 bytes more.",
)
@click.option(
    "--max-files",
    type=click.IntRange(1, 10**9),
    default=1_000_000,
    show_default=True,
    metavar="N",
    help="Fail if a copy out of a guest has more files, directories and links.",
)
def command(
    source: tuple[str | None, str],
    target: tuple[str | None, str],
    max_size: int,
    max_files: int,
) -> None:
    """Copy files and directories into a guest or out of it.

    One of SOURCE and TARGET is GUEST:PATH, the other is a path of this host; write ./NAME for a
    host's file whose name has a colon. As with cp(1), the copy goes into TARGET if that is a
    directory. Existing files are replaced; modes and times are kept. The guest's image needs no
    program for it.
    """
    from onecopy.guest.runtime import Runtime
    from onecopy.guest.transfer.copy import copy_in, copy_out
    from onecopy.guest.transfer.tar import Limits

    (out_of, path), (into, where) = source, target
    if (out_of is None) == (into is None):
        raise InvalidInput(
            "one of SOURCE and TARGET has to be in a guest, and only one",
            hint="write GUEST:PATH for it, for example onecopy cp web-1:/var/log logs",
        )
    host = Runtime.open()
    if out_of is not None:
        folder = host.guest_with_agent(out_of).path
        limits = Limits(max_size, max_files)
        asyncio.run(copy_out(folder, require_text(path), where, limits))
    elif into is not None:
        folder = host.guest_with_agent(into).path
        asyncio.run(copy_in(folder, path, require_text(where)))
