"""onecopy serve"""

from __future__ import annotations

import sys

import click

from onecopy.cli.commands import Command
from onecopy.cli.event_loop import asyncio
from onecopy.cli.output import print_line


@click.command(
    "serve",
    cls=Command,
    examples=[
        ("onecopy serve", "Serve requests, and print each, until Ctrl-C."),
        ("onecopy exec web onecopy-segment load notes /srv", "Request a segment in a guest."),
    ],
)
@click.option("--quiet", is_flag=True, help="Do not print each request.")
def command(quiet: bool) -> None:
    """Serve guests that request segments by name.

    In a guest, `onecopy-segment load NAME [MOUNTPOINT]`, `unload`, `find` and `list` send requests.
    The rules are those of `onecopy attach`. The command runs until it is ended; guests run on
    without it, but their requests fail.
    """
    from onecopy.guest.runtime import Runtime
    from onecopy.guest.segments.service import serve

    def tell(text: str) -> None:
        if not quiet:
            print_line(text, sys.stderr)

    host = Runtime.open()
    tell(f"onecopy: serving the guests of {host.store.root}")
    asyncio.run(serve(host, tell))
