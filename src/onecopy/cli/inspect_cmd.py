"""onecopy inspect"""

import click

from onecopy.cli.commands import Command
from onecopy.cli.output import print_json
from onecopy.cli.params import ReferenceType
from onecopy.errors import NotFound
from onecopy.model import Reference


@click.command(
    "inspect",
    cls=Command,
    examples=[
        ("onecopy inspect web", "Print the record and memory account of the guest web."),
        ("onecopy inspect hello | jq .config.memory", "Print the RAM of a saved system."),
    ],
)
@click.argument("name", type=ReferenceType(guests=True))
def command(name: Reference) -> None:
    """Print all details of a segment, saved system, kernel or guest.

    The output is JSON; docs/json.md has the fields. If names are equal, a running guest comes first
    and an ended guest last. A running guest is shown with the memory that the kernel counts for it.
    """
    import msgspec

    from onecopy.guest import ended_guests
    from onecopy.guest.observe.accounts import guest_maps
    from onecopy.guest.observe.inspect import describe_fully
    from onecopy.guest.runtime import Runtime
    from onecopy.linux.files import no_process
    from onecopy.sharing.report import collect

    host = Runtime.open()
    guest = next((each for each in host.guests() if each.name == name.name), None)
    if guest and not name.digest:
        accounts = collect(guest_maps([guest])).guests
        if not accounts:
            raise no_process(guest.pid)
        account = msgspec.to_builtins(accounts[0])
        print_json(msgspec.to_builtins(guest) | {"account": account})
        return
    try:
        print_json(describe_fully(host.store, host.store.resolve(name)))
    except NotFound:
        gone = ended_guests.find(host.run, name.name)
        if not gone or name.digest:
            raise
        print_json(msgspec.to_builtins(gone) | {"account": None})
