"""onecopy serve"""

from __future__ import annotations

import asyncio
import sys

import click

from onecopy.cli.output import print_line


@click.command("serve")
@click.option("--quiet", is_flag=True, help="Do not print each request.")
def command(quiet: bool) -> None:
    """Answer guests that ask for segments by name, until it is ended.

    In a guest: onecopy-segment load NAME [MOUNTPOINT], unload, find, list. The rules are those of
    `onecopy attach`. Guests go on without it; they just cannot ask.
    """
    from onecopy.guest.runtime import Runtime
    from onecopy.guest.segments.service import serve

    def tell(text: str) -> None:
        if not quiet:
            print_line(text, sys.stderr)

    host = Runtime.open()
    tell(f"onecopy: answering the guests of {host.store.root}")
    asyncio.run(serve(host, tell))
