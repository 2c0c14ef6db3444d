"""onecopy verify"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onecopy.cli.params import ReferenceType
from onecopy.errors import InvalidInput, OnecopyError, StoreDamaged
from onecopy.model import Reference

if TYPE_CHECKING:
    from onecopy.store import Artifact


@click.command("verify")
@click.argument("names", nargs=-1, type=ReferenceType())
@click.option("--all", "everything", is_flag=True, help="All that is in the store.")
def command(names: tuple[Reference, ...], everything: bool) -> None:
    """Read segments or saved systems, compare their digests, check their file systems.

    Of several all are read, and it fails at the end if one is damaged. It says if fs-verity is on:
    then the kernel checks what guests read, too, and lets nobody write to it.
    """
    from onecopy.images.fsck import check_images
    from onecopy.store import Store
    from onecopy.store.disk import file_errors

    if bool(names) == everything:
        raise InvalidInput("it is not said what to verify", hint="give names, or --all")
    store = Store()
    damaged: list[OnecopyError] = []
    for artifact in store.artifacts() if everything else map(store.resolve, names):
        try:
            # What fs-verity guards cannot even be read once it is changed.
            with file_errors(store.root):
                store.verify(artifact)
                checked = check_images(artifact)
        except StoreDamaged as error:
            damaged.append(error)
        else:
            print(f"{artifact.ref} is whole{_told(checked)}{_protected(artifact)}")
    if damaged:
        raise StoreDamaged(
            "\n".join(error.message for error in damaged),
            hint="\n".join(dict.fromkeys(error.hint for error in damaged)),
        )


def _told(checked: list[str]) -> str:
    return f", its file systems are sound: {', '.join(checked)}" if checked else ""


def _protected(artifact: Artifact) -> str:
    """Whether the kernel sees to it, too."""
    from onecopy.linux.verity import is_enabled

    found = [is_enabled(layer.path) for layer in artifact.layers]
    return f"; fs-verity is on for {sum(found)} of {len(found)} blobs" if any(found) else ""
