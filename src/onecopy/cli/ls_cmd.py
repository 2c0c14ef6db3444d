"""onecopy ls"""

from collections.abc import Sequence

import click

from onecopy.cli.commands import Command
from onecopy.cli.listing import Listing, Row, listing_options, print_list
from onecopy.cli.tables import print_table
from onecopy.model import format_size, in_order

#: The fields of an entry that --json prints (docs/json.md).
FIELDS = (
    *("name", "version", "kind", "state", "domain", "grants", "classes", "digest", "created"),
    *("size", "resident", "users", "pinned"),
)


@click.command(
    "ls",
    cls=Command,
    examples=[
        ("onecopy ls --kind system", "List saved systems."),
        ("onecopy ls --filter 'users=web-*' --quiet", "Name what the guests web-... hold."),
    ],
)
@click.option(
    "--kind",
    type=click.Choice(["segment", "system", "kernel"]),
    help="List only this kind. Default: all kinds.",
)
@listing_options
def command(kind: str | None, listing: Listing) -> None:
    """List segments, saved systems and kernels.

    STATE is A (available), R (restricted to granted guests) or P (pending purge: removed or
    replaced, and deleted after its last user). CLASSES are the page classes of a segment's ranges.
    SIZE is the length of all blobs that the entry needs; the store holds a blob once. RESIDENT is
    the part of them in the host's page cache. USERS is the number of guests and pins that hold the
    entry; a clone holds its saved system.
    """
    from onecopy.guest.observe.inspect import describe
    from onecopy.store import Store

    store = Store()
    found = [describe(store, artifact) for artifact in store.artifacts(kind)]
    found += [
        describe(store, artifact, pending=True)
        for artifact in store.pending()
        if kind in (None, artifact.kind)
    ]
    found.sort(key=lambda item: (*map(in_order, (item["name"], item["version"])), item["state"]))
    print_list(
        listing, found, FIELDS, name=lambda row: f"{row['name']}:{row['version']}", table=_print
    )


def _print(rows: Sequence[Row]) -> None:
    cells = [
        [
            item["name"],
            item["version"],
            item["kind"],
            item["state"],
            item["domain"] or "-",
            "?" if item["classes"] is None else " ".join(item["classes"]) or "-",
            format_size(item["size"]),
            "?" if item["resident"] is None else format_size(item["resident"]),
            str(len(item["users"])),
            item["created"] or "-",
            item["digest"][:19],
        ]
        for item in rows
    ]
    headings = ["NAME", "VERSION", "KIND", "STATE", "DOMAIN", "CLASSES"]
    headings += ["SIZE", "RESIDENT", "USERS", "CREATED", "DIGEST"]
    print_table(headings, cells)
