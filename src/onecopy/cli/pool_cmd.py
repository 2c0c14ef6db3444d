"""onecopy pool"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onecopy.cli.commands import Command
from onecopy.cli.event_loop import asyncio
from onecopy.cli.listing import Listing, listing_options, print_list
from onecopy.cli.output import progress
from onecopy.cli.params import ReferenceType
from onecopy.cli.tables import print_table
from onecopy.errors import InvalidInput
from onecopy.model import Reference

if TYPE_CHECKING:
    from onecopy.guest.lifecycle.pool import Pool
    from onecopy.guest.runtime import Runtime


@click.command(
    "pool",
    cls=Command,
    examples=[
        ("onecopy pool hello 4", "Keep four guests of the saved system hello ready."),
        ("onecopy pool hello 0", "End them."),
    ],
)
@click.argument("system", required=False, type=ReferenceType("system"))
@click.argument("size", required=False, type=click.IntRange(0, 10000))
@click.option("--fill", is_flag=True, help="Fill all pools again, and do nothing else.")
@listing_options
def command(system: Reference | None, size: int | None, fill: bool, listing: Listing) -> None:
    """Keep guests ready, so that `onecopy run` starts them faster.

    A ready guest is a QEMU process that has loaded SYSTEM and waits: it takes memory, as `onecopy
    report` shows, but no CPU time. `onecopy run` uses it for any ports, disks and segments, but not
    with --bridge, --allow-host or --ksm. When half of a pool is used, onecopy fills it again in the
    background. Without SYSTEM the command lists the pools.
    """
    from onecopy.guest.lifecycle import pool, pool_fill
    from onecopy.guest.runtime import Runtime

    if system and (size is None or fill):
        raise InvalidInput(
            f"the number of guests to keep ready of {system} is missing, or --fill is given too",
            hint=f"give a number: onecopy pool {system} 4",
        )
    host = Runtime.open()
    if fill:
        asyncio.run(pool_fill.fill(host))
    elif system and size is not None:
        with progress() as tell:
            tell(f"{'starting' if size else 'ending'} guests of {system}")
            _print([_resized(host, system, size)], listing)
    else:
        _print(pool.pools(host), listing)


def _resized(host: Runtime, system: Reference, size: int) -> Pool:
    from onecopy.guest.lifecycle import pool_fill

    return asyncio.run(pool_fill.resize(host, host.store.resolve(system, "system"), size))


def _print(pools: list[Pool], listing: Listing) -> None:
    import msgspec

    print_list(
        listing,
        msgspec.to_builtins(pools),
        ("system", "size", "ready"),
        name=lambda row: str(row["system"]),
        table=lambda rows: print_table(
            ["SYSTEM", "SIZE", "READY"],
            [[row["system"], str(row["size"]), str(len(row["ready"]))] for row in rows],
        ),
    )
