"""onecopy rm"""

import click

from onecopy.cli.params import ReferenceType
from onecopy.model import Reference


@click.command("rm")
@click.argument("names", nargs=-1, required=True, type=ReferenceType())
def command(names: tuple[Reference, ...]) -> None:
    """Remove segments, saved systems or kernels.

    What a guest uses is not removed: the error says who uses it.
    """
    from onecopy.store import Store

    store = Store()
    for name in names:
        print(f"{store.remove(name).ref} removed")
