"""onecopy verify"""

import click

from onecopy.cli.params import ReferenceType
from onecopy.model import Reference


@click.command("verify")
@click.argument("names", nargs=-1, required=True, type=ReferenceType())
def command(names: tuple[Reference, ...]) -> None:
    """Read a segment or saved system and compare its digests."""
    from onecopy.store import Store

    store = Store()
    for name in names:
        artifact = store.resolve(name)
        store.verify(artifact)
        print(f"{artifact.ref} is whole")
