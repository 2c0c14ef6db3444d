"""onecopy rm"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onecopy.cli.commands import Command
from onecopy.cli.output import each_of
from onecopy.cli.params import ReferenceType
from onecopy.errors import InvalidInput, NotFound
from onecopy.model import DEFAULT_VERSION, Reference

if TYPE_CHECKING:
    from onecopy.guest.runtime import Runtime


@click.command(
    "rm",
    cls=Command,
    examples=[
        ("onecopy rm hello app:1.2", "Remove a saved system, and one version of a segment."),
        ("onecopy rm --ended", "Remove what is kept of all ended guests."),
    ],
)
@click.argument("names", nargs=-1, type=ReferenceType(guests=True), metavar="[NAME]...")
@click.option(
    "--pending",
    is_flag=True,
    help="Remove NAME even if guests use it. They keep it, nobody new can load it, and its last "
    "user's end deletes it.",
)
@click.option(
    "--ended", "every_ended", is_flag=True, help="Remove all guests that ended by themselves."
)
def command(names: tuple[Reference, ...], pending: bool, every_ended: bool) -> int:
    """Remove segments, saved systems, kernels and ended guests.

    The command refuses a NAME that guests use, and names the guests. It removes the other NAMES,
    and exits with the code of the first failure.
    """
    from onecopy.guest.runtime import Runtime

    if every_ended == bool(names):
        raise InvalidInput(
            "names and --ended: exactly one of them is needed", hint="give names, or --ended"
        )
    host = Runtime.open()
    if every_ended:
        _forget(host, *(guest.name for guest in host.ended()))
        return 0
    return each_of(names, lambda name: _remove(host, name, pending=pending))


def _remove(host: Runtime, name: Reference, *, pending: bool) -> None:
    from onecopy.guest import ended_guests
    from onecopy.guest.lifecycle import pool

    try:
        pool.remove(host, name)
        artifact = host.store.remove(name, in_use=pending)
    except NotFound as error:
        if name.digest or name.version != DEFAULT_VERSION:
            raise
        if ended_guests.find(host.run, name.name):
            _forget(host, name.name)
            return
        if any(guest.name == name.name for guest in host.guests()):
            stop = f"`onecopy stop {name.name}` ends it"
            raise NotFound(f"{name.name} is a running guest", hint=stop) from error
        raise
    pool.trim(host)
    users = host.store.users(artifact.digest)
    kept = f"; its data stays until {', '.join(users)} ends" if users else ""
    print(f"{artifact.ref} removed{kept}")


def _forget(host: Runtime, *names: str) -> None:
    host.forget(*names)
    for name in names:
        print(f"{name} removed: it had ended")
