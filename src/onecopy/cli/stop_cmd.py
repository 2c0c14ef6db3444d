"""onecopy stop"""

import asyncio

import click

from onecopy.cli.output import each_of
from onecopy.cli.params import GuestType, SecondsType
from onecopy.errors import InvalidInput


@click.command("stop")
@click.argument("guests", nargs=-1, type=GuestType(ended=True))
@click.option("--all", "every", is_flag=True, help="All guests that run.")
@click.option(
    "--timeout",
    type=SecondsType(0),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="How long the programs of each guest get to end before they are killed. Time in which the "
    "guest waits for the host's processors does not count.",
)
@click.option(
    "--now",
    is_flag=True,
    help="Do not ask: end them (what they wrote is gone anyway, but for disks).",
)
def command(guests: tuple[str, ...], every: bool, timeout: float, now: bool) -> int:
    """Stop guests: ask, wait, end.

    Nothing is kept of them. One that had ended by itself is told, and removed.
    """
    from onecopy.guest import ended_guests
    from onecopy.guest.lifecycle.stop import stop_guests
    from onecopy.guest.lost_vmms import find, shown
    from onecopy.guest.run_directory import GuestRecord
    from onecopy.guest.runtime import Runtime

    if every == bool(guests):
        raise InvalidInput("say which guests to stop", hint="name them, or give --all")
    host = Runtime.open()
    records = shown(host) if every else []
    gone: list[GuestRecord] = []

    def choose(name: str) -> None:
        known = name in ended_guests.names(host.run) and ended_guests.find(host.run, name)
        if known:
            gone.append(known)
        else:
            records.append(find(host, name))

    # One that is not there lets the others run for no longer.
    code = each_of(guests, choose)
    endings = asyncio.run(stop_guests(host, records, 0 if now else timeout))
    for record, ending in zip(records, endings, strict=True):
        print(f"{record.name} {ending.text}")
    host.forget(*(record.name for record in gone))
    for record in gone:
        if record.ended:
            print(f"{record.name} had ended: {record.ended.reason}")
    return code
