"""onecopy tag"""

from __future__ import annotations

import click

from onecopy.cli.params import ReferenceType, domain_of, domain_option
from onecopy.model import Reference


@click.command("tag")
@click.argument("source", type=ReferenceType())
@click.argument("target", type=ReferenceType())
@domain_option
def command(source: Reference, target: Reference, domain: str | None) -> None:
    """Give a segment, saved system or kernel a further name or version.

    NAME without a version is NAME:latest, what is meant when no version is given. In another trust
    domain it is a copy, in memory too.
    """
    from onecopy.store import Store

    artifact = Store().tag(source, target, domain=domain_of(domain))
    print(f"{artifact.ref} {artifact.digest}")
