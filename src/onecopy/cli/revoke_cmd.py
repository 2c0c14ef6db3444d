"""onecopy revoke"""

import click

from onecopy.cli.params import NameType, print_access
from onecopy.errors import InvalidInput, NotFound


@click.command("revoke")
@click.argument("name", type=NameType())
@click.argument("guests", nargs=-1, metavar="GUEST...")
@click.option("--all", "every", is_flag=True, help="All grants.")
@click.option("--unrestrict", is_flag=True, help="Let every guest of the trust domain load it.")
def command(name: str, guests: tuple[str, ...], every: bool, unrestrict: bool) -> None:
    """Take grants back: these guests cannot load the segment or saved system any more.

    Who has loaded it keeps it.
    """
    from msgspec.structs import replace

    from onecopy.store import Access, Store

    if bool(guests) + every + unrestrict != 1:
        raise InvalidInput("say what to take back", hint="name grants, or --all, or --unrestrict")

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
