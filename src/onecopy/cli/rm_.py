"""onecopy rm"""

import click

from onecopy.cli.params import ReferenceType
from onecopy.model import Reference


@click.command("rm")
@click.argument("names", nargs=-1, required=True, type=ReferenceType())
@click.option(
    "--pending",
    is_flag=True,
    help="Also if guests use it: it goes with the last of them, and nobody new can load it.",
)
def command(names: tuple[Reference, ...], pending: bool) -> None:
    """Remove segments, saved systems or kernels.

    What a guest uses is not removed: the error says who uses it.
    """
    from onecopy.guest import pool
    from onecopy.guest.host import Host

    host = Host.open()
    store = host.store
    for name in names:
        pool.remove(host, name)
        artifact = store.remove(name, in_use=pending)
        pool.trim(host)
        users = store.users(artifact.digest)
        kept = f"; its bytes stay until {', '.join(users)} ends" if users else ""
        print(f"{artifact.ref} removed{kept}")
