"""onecopy preload"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onecopy.cli.commands import Command
from onecopy.cli.output import print_json
from onecopy.cli.params import ReferenceType, json_option
from onecopy.cli.tables import print_table
from onecopy.errors import InvalidInput
from onecopy.model import Reference, format_size

if TYPE_CHECKING:
    from onecopy.store import Artifact, Store


@click.command(
    "preload",
    cls=Command,
    examples=[
        ("onecopy preload hello", "Load what earlier guests of hello used."),
        ("onecopy preload --pin python", "Load all of a segment, and keep it in memory."),
    ],
)
@click.argument("names", nargs=-1, required=True, type=ReferenceType())
@click.option(
    "--whole", is_flag=True, help="Load everything, even if a record of used pages exists."
)
@click.option(
    "--record", is_flag=True, help="Record the pages that running guests have used; load nothing."
)
@click.option("--drop", is_flag=True, help="Drop NAMES from memory; load nothing.")
@click.option(
    "--pin", is_flag=True, help="Load everything, and lock it in memory (mlock) until --unpin."
)
@click.option("--unpin", is_flag=True, help="Unlock it, so that the kernel may drop it.")
@json_option
def command(
    names: tuple[Reference, ...],
    whole: bool,
    record: bool,
    drop: bool,
    pin: bool,
    unpin: bool,
    as_json: bool,
) -> None:
    """Load segments, systems or kernels into memory in advance.

    The command loads the recorded pages; without a record, everything. To make a record, start a
    guest, let it work, and run `onecopy preload --record NAME`. Later starts then read these pages
    ahead by themselves.

    The kernel may drop loaded pages unless they are pinned; `onecopy ls` counts a pin as a user.
    REQUESTED is what the command asked the kernel for. BEFORE and AFTER are the parts of the file
    in the host's page cache, whoever loaded them.
    """
    from onecopy.store import Store

    modes = {"whole": whole, "record": record, "drop": drop, "pin": pin, "unpin": unpin}
    chosen = [mode for mode, given in modes.items() if given]
    if len(chosen) > 1:
        raise InvalidInput(
            f"--{chosen[0]} and --{chosen[1]} exclude each other", hint="give one of them"
        )
    store, mode = Store(), "".join(chosen)
    artifacts = [store.resolve(name) for name in names]
    if mode in ("pin", "unpin"):
        _pin(store, artifacts, as_json) if mode == "pin" else _unpin(store, artifacts)
    else:
        _load(store, artifacts, mode, as_json)


def _pin(store: Store, artifacts: list[Artifact], as_json: bool) -> None:
    import msgspec

    from onecopy.guest.pagecache.pin import pin

    pinned = [pin(store, artifact) for artifact in artifacts]
    if as_json:
        print_json([msgspec.to_builtins(each) for each in pinned])
        return
    for each in pinned:
        huge = f"{format_size(each.huge)} of it in huge pages"
        why = f" (the kernel makes none: {each.collapse})" if each.collapse else ""
        print(f"{each.name} pinned: {format_size(each.locked)}, {huge}{why}")


def _unpin(store: Store, artifacts: list[Artifact]) -> None:
    from onecopy.guest.pagecache.pin import unpin

    for artifact in artifacts:
        unpin(store, artifact)
        print(f"{artifact.ref} is no longer pinned")


def _load(store: Store, artifacts: list[Artifact], mode: str, as_json: bool) -> None:
    import msgspec

    from onecopy.guest.pagecache import preload
    from onecopy.guest.pagecache.mapped import Users
    from onecopy.guest.runtime import Runtime

    found: list[preload.Warmed] = []
    for artifact in artifacts:
        if mode == "record":
            host = Runtime.open(store.root)
            found += preload.record(store, artifact, Users(host, artifact))
        elif mode == "drop":
            found += preload.drop(store, artifact)
        else:
            found += preload.warm(store, artifact, whole=mode == "whole")
    if as_json:
        print_json([msgspec.to_builtins(each) for each in found])
        return
    rows = [
        [
            each.name,
            each.role or "-",
            each.digest[:19],
            format_size(each.size),
            each.action,
            format_size(each.requested_bytes),
            "?" if each.before is None else format_size(each.before),
            "?" if each.after is None else format_size(each.after),
        ]
        for each in found
    ]
    headings = ["NAME", "BLOB", "DIGEST", "SIZE", "ACTION", "REQUESTED", "BEFORE", "AFTER"]
    print_table(headings, rows)
