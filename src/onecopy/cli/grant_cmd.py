"""onecopy grant"""

import click

from onecopy.cli.commands import Command
from onecopy.cli.params import GrantType, NameType, print_access


@click.command(
    "grant",
    cls=Command,
    examples=[
        ("onecopy grant secrets 'web-*' db", "Let web-1, web-2... and db load the segment."),
        ("onecopy grant secrets", "Restrict it; nobody new is granted it."),
    ],
)
@click.argument("name", type=NameType())
@click.argument("guests", nargs=-1, type=GrantType(), metavar="[GUEST]...")
def command(name: str, guests: tuple[str, ...]) -> None:
    """Restrict a segment or saved system to certain guests.

    GUEST is a name, a pattern such as 'web-*', or domain:NAME for all guests of a trust domain. The
    grants add to those that exist, and hold for all versions of NAME, also for later ones.
    """
    from msgspec.structs import replace

    from onecopy.store import Store
    from onecopy.store.access import check_grant

    wanted = {check_grant(guest) for guest in guests}
    access = Store().restrict(
        name,
        lambda now: replace(now, restricted=True, grants=tuple(sorted({*now.grants, *wanted}))),
    )
    print_access(name, access)
