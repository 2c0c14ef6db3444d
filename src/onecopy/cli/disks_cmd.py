"""onecopy disks"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onecopy.cli.output import each_of, print_json, print_table
from onecopy.cli.params import json_option
from onecopy.model import format_size

if TYPE_CHECKING:
    from onecopy.guest.runtime import Runtime


@click.command("disks")
@click.option("--rm", "names", multiple=True, metavar="NAME", help="Remove it, with its content.")
@json_option
def command(names: tuple[str, ...], as_json: bool) -> int:
    """List the disks of guests, or remove some.

    These are the guests' own (`run --disk SIZE`), by the name of the guest. ALLOCATED is what they
    take on the host. JSON: docs/json.md.
    """

    import msgspec

    from onecopy.guest.lifecycle.disks import list_own_disks
    from onecopy.guest.runtime import Runtime

    host = Runtime.open()
    if names:
        return each_of(names, lambda name: _remove(host, name))
    found = list_own_disks(host)
    if as_json:
        print_json([msgspec.to_builtins(item) for item in found])
        return 0
    rows = [
        [item.name, format_size(item.size), format_size(item.allocated), item.guest or "-"]
        for item in found
    ]
    print_table(["NAME", "SIZE", "ALLOCATED", "USED BY"], rows)
    return 0


def _remove(host: Runtime, name: str) -> None:
    from onecopy.guest.lifecycle.disks import remove

    remove(host, name)
    print(f"the disk of {name} is removed")
