"""onecopy ls"""

import click

from onecopy.cli.output import print_json, print_table
from onecopy.cli.params import json_option
from onecopy.model import format_size


@click.command("ls")
@click.option("--kind", type=click.Choice(["segment", "system", "kernel"]), help="Only these.")
@json_option
def command(kind: str | None, as_json: bool) -> None:
    """List segments, saved systems and kernels.

    SIZE counts all blobs that it needs; blobs that several have in common lie in the store once.
    RESIDENT is how much of them is in the host's page cache now. JSON: docs/json.md.
    """
    from onecopy.guest.artifacts import describe
    from onecopy.store import Store

    store = Store()
    found = [describe(store, artifact) for artifact in store.artifacts(kind)]
    if as_json:
        print_json(found)
        return
    rows = [
        [
            item["name"],
            item["version"],
            item["kind"],
            format_size(item["size"]),
            "?" if item["resident"] is None else format_size(item["resident"]),
            str(len(item["users"])),
            item["created"],
            item["digest"][:19],
        ]
        for item in found
    ]
    headings = ["NAME", "VERSION", "KIND", "SIZE", "RESIDENT", "USERS", "CREATED", "DIGEST"]
    print_table(headings, rows)
