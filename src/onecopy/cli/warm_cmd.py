"""onecopy warm"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onecopy.cli.output import print_json, print_table
from onecopy.cli.params import ReferenceType, json_option
from onecopy.errors import InvalidInput
from onecopy.model import Reference, format_size

if TYPE_CHECKING:
    from onecopy.store import Artifact, Store


@click.command("warm")
@click.argument("names", nargs=-1, required=True, type=ReferenceType())
@click.option("--whole", is_flag=True, help="All of it, even if less is recorded.")
@click.option(
    "--record", is_flag=True, help="Remember what the present guests have touched; load nothing."
)
@click.option("--drop", is_flag=True, help="Drop it from memory; load nothing.")
@click.option("--pin", is_flag=True, help="Load all and keep it in memory (mlock) until --unpin.")
@click.option("--unpin", is_flag=True, help="Let the kernel drop it again.")
@json_option
def command(names: tuple[Reference, ...], as_json: bool, **modes: bool) -> None:
    """Load segments, saved systems or kernels into memory before guests need them.

    What earlier guests touched is loaded if it is recorded, else all. To record it: start a guest,
    let it work, then `warm --record`; from then on it is also read ahead at each start of a guest.
    Of what no guest has mapped that records what is in memory. BEFORE and AFTER are how much of the
    whole file is in the host's page cache, whoever loaded it; WANTED is what this asked for. The
    kernel may drop it again, unless it is pinned: a small process keeps it then, which `ls` counts
    as a user. JSON: docs/json.md.
    """
    from onecopy.store import Store

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
        _warm(store, artifacts, mode, as_json)


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
        print(f"{artifact.ref} is not pinned any more")


def _warm(store: Store, artifacts: list[Artifact], mode: str, as_json: bool) -> None:

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
            each.what,
            format_size(each.wanted),
            "?" if each.before is None else format_size(each.before),
            "?" if each.after is None else format_size(each.after),
        ]
        for each in found
    ]
    headings = ["NAME", "BLOB", "DIGEST", "SIZE", "WHAT", "WANTED", "BEFORE", "AFTER"]
    print_table(headings, rows)
