"""onecopy revoke"""

import click

from onecopy.cli.commands import Command
from onecopy.cli.params import GrantType, NameType, print_access
from onecopy.errors import InvalidInput, NotFound


@click.command(
    "revoke",
    cls=Command,
    examples=[
        ("onecopy revoke secrets 'web-*'", "Withdraw one grant."),
        ("onecopy revoke --unrestrict secrets", "Let all guests of its trust domain load it."),
    ],
)
@click.argument("name", type=NameType())
@click.argument("guests", nargs=-1, type=GrantType(), metavar="[GUEST]...")
@click.option("--all", "every", is_flag=True, help="Withdraw all grants; NAME stays restricted.")
@click.option(
    "--unrestrict", is_flag=True, help="Let every guest of the trust domain load NAME again."
)
def command(name: str, guests: tuple[str, ...], every: bool, unrestrict: bool) -> None:
    """Withdraw grants from a segment or saved system.

    GUEST is a grant as it was given to `onecopy grant`. Guests that have loaded NAME keep it.
    """
    from msgspec.structs import replace

    from onecopy.store import Access, Store

    if bool(guests) + every + unrestrict != 1:
        raise InvalidInput(
            "no grant to withdraw is named, or more than one of GUEST, --all and --unrestrict",
            hint="give grants, or --all, or --unrestrict",
        )

    def change(now: Access) -> Access:
        if unrestrict:
            return replace(now, restricted=False, grants=())
        unknown = sorted(set(guests) - set(now.grants))
        if unknown:
            raise NotFound(
                f"{name} has no grant {unknown[0]}",
                hint=f"it is granted to {', '.join(now.grants) or 'nobody'}",
            )
        return replace(now, grants=tuple(g for g in now.grants if not every and g not in guests))

    print_access(name, Store().restrict(name, change))
