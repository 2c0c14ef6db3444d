"""onecopy stop"""

import click

from onecopy.cli.commands import Command
from onecopy.cli.event_loop import asyncio
from onecopy.cli.output import each_of
from onecopy.cli.params import GuestType, SecondsType
from onecopy.errors import InvalidInput


@click.command(
    "stop",
    cls=Command,
    examples=[
        ("onecopy stop web-1 web-2", "Shut two guests down."),
        ("onecopy stop --all --now", "End all guests at once."),
    ],
)
@click.argument("guests", nargs=-1, type=GuestType(ended=True), metavar="[GUEST]...")
@click.option("--all", "every", is_flag=True, help="Stop all running guests.")
@click.option(
    "--timeout",
    type=SecondsType(0),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="Time for the programs of each guest to end, in seconds; then they are killed. Time in "
    "which the guest waits for the host's processors does not count.",
)
@click.option(
    "--now",
    is_flag=True,
    help="End the guests without shutting them down. Unwritten data of their disks may be lost.",
)
def command(guests: tuple[str, ...], every: bool, timeout: float, now: bool) -> int:
    """Stop guests.

    The command asks each guest to shut down, waits, and ends it. Only the content of disks
    (`--disk`) stays. A guest that had ended by itself is reported and removed.
    """
    from onecopy.guest import ended_guests
    from onecopy.guest.lifecycle.stop import stop_guests
    from onecopy.guest.lost_vmms import find, shown
    from onecopy.guest.run_directory import GuestRecord
    from onecopy.guest.runtime import Runtime

    if every == bool(guests):
        raise InvalidInput(
            "guests and --all: exactly one of them is needed", hint="name guests, or give --all"
        )
    host = Runtime.open()
    records = shown(host) if every else []
    gone: list[GuestRecord] = []

    def choose(name: str) -> None:
        known = name in ended_guests.names(host.run) and ended_guests.find(host.run, name)
        if known:
            gone.append(known)
        else:
            records.append(find(host, name))

    # The other guests are stopped even if one name is wrong.
    code = each_of(guests, choose)
    endings = asyncio.run(stop_guests(host, records, 0 if now else timeout))
    for record, ending in zip(records, endings, strict=True):
        print(f"{record.name} {ending.text}")
    host.forget(*(record.name for record in gone))
    for record in gone:
        if record.ended:
            print(f"{record.name} had ended: {record.ended.reason}")
    return code
