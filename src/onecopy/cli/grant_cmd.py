"""onecopy grant"""

import click

from onecopy.cli.params import NameType, print_access


@click.command("grant")
@click.argument("name", type=NameType())
@click.argument("guests", nargs=-1, metavar="GUEST...")
def command(name: str, guests: tuple[str, ...]) -> None:
    """Restrict a segment or saved system to the guests named, also patterns such as web-*.

    domain:NAME grants it to all guests of a trust domain. Without GUEST nobody new is granted. It
    holds for all versions, also those to come.
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
