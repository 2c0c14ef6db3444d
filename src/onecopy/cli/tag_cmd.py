"""onecopy tag"""

from __future__ import annotations

import click

from onecopy.cli.commands import Command
from onecopy.cli.params import ReferenceType, domain_of, domain_option
from onecopy.model import Reference


@click.command(
    "tag",
    cls=Command,
    examples=[
        ("onecopy tag app:1.3 app", "Let app without a version mean version 1.3."),
        ("onecopy tag --domain lab python lab-python", "Copy a segment into a trust domain."),
    ],
)
@click.argument("source", type=ReferenceType())
@click.argument("target", type=ReferenceType())
@domain_option
def command(source: Reference, target: Reference, domain: str | None) -> None:
    """Add a name or version to a segment, saved system or kernel.

    NAME without a version is NAME:latest. In another trust domain the target is a copy, on disk and
    in memory.
    """
    from onecopy.store import Store

    artifact = Store().tag(source, target, domain=domain_of(domain))
    print(f"{artifact.ref} {artifact.digest}")
