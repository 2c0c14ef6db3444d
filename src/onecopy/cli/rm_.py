"""onecopy rm"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onecopy.cli.output import each_of
from onecopy.cli.params import ReferenceType
from onecopy.model import Reference

if TYPE_CHECKING:
    from onecopy.guest.host import Host


@click.command("rm")
@click.argument("names", nargs=-1, required=True, type=ReferenceType())
@click.option(
    "--pending",
    is_flag=True,
    help="Also if guests use it: it goes with the last of them, and nobody new can load it.",
)
def command(names: tuple[Reference, ...], pending: bool) -> int:
    """Remove segments, saved systems or kernels.

    What a guest uses is not removed: the error says who uses it. Of several all that can be
    removed are; what cannot is told, and the exit code is that of the first.
    """
    from onecopy.guest.host import Host

    host = Host.open()
    return each_of(names, lambda name: _remove(host, name, pending=pending))


def _remove(host: Host, name: Reference, *, pending: bool) -> None:
    from onecopy.guest import pool

    pool.remove(host, name)
    artifact = host.store.remove(name, in_use=pending)
    pool.trim(host)
    users = host.store.users(artifact.digest)
    kept = f"; its bytes stay until {', '.join(users)} ends" if users else ""
    print(f"{artifact.ref} removed{kept}")
