"""onecopy ls"""

import click

from onecopy.cli.output import print_json, print_table
from onecopy.cli.params import json_option
from onecopy.model import format_size, in_order


@click.command("ls")
@click.option("--kind", type=click.Choice(["segment", "system", "kernel"]), help="Only these.")
@json_option
def command(kind: str | None, as_json: bool) -> None:
    """List segments, saved systems and kernels.

    STATE is A (available), R (restricted: only for guests granted) or P (pending purge: removed or
    replaced, and gone with its last user). CLASSES are the page classes of a segment's ranges.
    USERS counts guests (and pins) that hold it itself; clones hold their saved system.
    SIZE counts all blobs that it needs; blobs that several have in common lie in the store once.
    RESIDENT is how much of them is in the host's page cache now. JSON: docs/json.md.
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
    if as_json:
        print_json(found)
        return
    rows = [
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
        for item in found
    ]
    headings = ["NAME", "VERSION", "KIND", "STATE", "DOMAIN", "CLASSES"]
    headings += ["SIZE", "RESIDENT", "USERS", "CREATED", "DIGEST"]
    print_table(headings, rows)
