"""onecopy pool"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from onecopy.cli.output import print_json, print_table, progress
from onecopy.cli.params import ReferenceType, json_option
from onecopy.errors import InvalidInput
from onecopy.model import Reference

if TYPE_CHECKING:
    from onecopy.guest.lifecycle.pool import Pool
    from onecopy.guest.runtime import Runtime


@click.command("pool")
@click.argument("system", required=False, type=ReferenceType("system"))
@click.argument("size", required=False, type=click.IntRange(0, 10000))
@click.option("--fill", is_flag=True, help="Fill all pools; nothing else.")
@json_option
def command(system: Reference | None, size: int | None, fill: bool, as_json: bool) -> None:
    """Keep SIZE guests of SYSTEM prepared, so that `run` starts them faster; 0 for none.

    A prepared guest is a QEMU that has loaded the saved system and waits: it costs its memory, as
    `report` shows, and no processor. `run` takes it, with any ports, disks and segments; not with
    --bridge, --allow-host or --ksm. Once half of a pool is taken it is filled again in the
    background. Without SYSTEM the pools are listed. JSON: docs/json.md.
    """
    from onecopy.guest.lifecycle import pool, pool_fill
    from onecopy.guest.runtime import Runtime

    if system and (size is None or fill):
        raise InvalidInput("how many?", hint="onecopy pool SYSTEM SIZE; 0 for none")
    host = Runtime.open()
    if fill:
        asyncio.run(pool_fill.fill(host))
    elif system and size is not None:
        with progress() as tell:
            tell(f"preparing guests of {system}" if size else f"ending those of {system}")
            _print([_resized(host, system, size)], as_json)
    else:
        _print(pool.pools(host), as_json)


def _resized(host: Runtime, system: Reference, size: int) -> Pool:
    from onecopy.guest.lifecycle import pool_fill

    return asyncio.run(pool_fill.resize(host, host.store.resolve(system, "system"), size))


def _print(pools: list[Pool], as_json: bool) -> None:
    import msgspec

    if as_json:
        print_json(msgspec.to_builtins(pools))
        return
    rows = [[each.system, str(each.size), str(len(each.ready))] for each in pools]
    print_table(["SYSTEM", "SIZE", "READY"], rows)
