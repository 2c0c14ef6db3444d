"""onecopy verify"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onecopy.cli.commands import Command
from onecopy.cli.params import ReferenceType
from onecopy.errors import InvalidInput, OnecopyError, StoreDamaged
from onecopy.model import Reference

if TYPE_CHECKING:
    from onecopy.store import Artifact


@click.command(
    "verify",
    cls=Command,
    examples=[
        ("onecopy verify python hello:2", "Check a segment and a saved system."),
        ("onecopy verify --all", "Check the whole store."),
    ],
)
@click.argument("names", nargs=-1, type=ReferenceType(), metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="Check all entries of the store.")
def command(names: tuple[Reference, ...], everything: bool) -> None:
    """Check digests and file systems of segments and saved systems.

    The command reads every entry, and fails at the end if one is damaged. It also tells whether
    fs-verity protects the files, so that the kernel checks what guests read.
    """
    from onecopy.images.fsck import check_images
    from onecopy.store import Store
    from onecopy.store.disk import file_errors

    if bool(names) == everything:
        raise InvalidInput(
            "names and --all: exactly one of them is needed", hint="give names, or --all"
        )
    store = Store()
    damaged: list[OnecopyError] = []
    for artifact in store.artifacts() if everything else map(store.resolve, names):
        try:
            # Reading a changed file that fs-verity protects fails.
            with file_errors(store.root):
                store.verify(artifact)
                checked = check_images(artifact)
        except StoreDamaged as error:
            damaged.append(error)
        else:
            print(f"{artifact.ref} is whole{_describe_checks(checked)}{_describe_verity(artifact)}")
    if damaged:
        raise StoreDamaged(
            "\n".join(error.message for error in damaged),
            hint="; ".join(dict.fromkeys(error.hint for error in damaged)),
        )


def _describe_checks(checked: list[str]) -> str:
    return f", its file systems are sound: {', '.join(checked)}" if checked else ""


def _describe_verity(artifact: Artifact) -> str:
    """Return the number of files with fs-verity as text; "" if there are none."""
    from onecopy.linux.verity import is_enabled

    found = [is_enabled(layer.path) for layer in artifact.layers]
    return f"; fs-verity is on for {sum(found)} of {len(found)} blobs" if any(found) else ""
