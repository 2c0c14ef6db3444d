"""onecopy rm"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onecopy.cli.output import each_of
from onecopy.cli.params import ReferenceType
from onecopy.errors import InvalidInput, NotFound
from onecopy.model import DEFAULT_VERSION, Reference

if TYPE_CHECKING:
    from onecopy.guest.runtime import Runtime


@click.command("rm")
@click.argument("names", nargs=-1, type=ReferenceType(guests=True))
@click.option(
    "--pending",
    is_flag=True,
    help="Also if guests use it: it goes with the last of them, and nobody new can load it.",
)
@click.option(
    "--ended", "every_ended", is_flag=True, help="Remove all guests that ended by themselves."
)
def command(names: tuple[Reference, ...], pending: bool, every_ended: bool) -> int:
    """Remove segments, saved systems, kernels, and guests that have ended.

    What a guest uses is not removed: the error says who uses it. Of several all that can be
    removed are; what cannot is told, and the exit code is that of the first.
    """
    from onecopy.guest.runtime import Runtime

    if every_ended == bool(names):
        raise InvalidInput("say what to remove", hint="name it, or give --ended")
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
            raise NotFound(f"{name.name} is a guest that runs", hint=stop) from error
        raise
    pool.trim(host)
    users = host.store.users(artifact.digest)
    kept = f"; its bytes stay until {', '.join(users)} ends" if users else ""
    print(f"{artifact.ref} removed{kept}")


def _forget(host: Runtime, *names: str) -> None:
    host.forget(*names)
    for name in names:
        print(f"{name} removed: it had ended")
