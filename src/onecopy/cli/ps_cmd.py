"""onecopy ps"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from onecopy.cli.commands import Command
from onecopy.cli.listing import Listing, listing_options, print_list
from onecopy.cli.output import duration, print_line, reasons
from onecopy.cli.tables import print_table

if TYPE_CHECKING:
    from onecopy.guest.run_directory import GuestRecord

_HEADINGS = ["NAME", "KIND", "SOURCE", "ACCEL", "PID", "UP", "STARTED IN", "PORTS"]


@click.command(
    "ps",
    cls=Command,
    examples=[
        ("onecopy ps --all", "List ended guests, too, and why they ended."),
        ("onecopy ps --filter kind=clone --format '{{.name}} {{.pid}}'", "Print a line per clone."),
    ],
)
@click.option(
    "-a", "--all", "every", is_flag=True, help="List guests that ended by themselves, too."
)
@listing_options
def command(every: bool, listing: Listing) -> None:
    """List running guests.

    A guest that ends by itself (it powers off, panics, its QEMU is killed...) stays known with its
    last output until `onecopy rm` or `onecopy stop` removes it, or another guest gets its name.
    onecopy keeps the newest 100 of them until the host reboots.
    """
    import msgspec

    from onecopy.guest import ended_guests
    from onecopy.guest.lost_vmms import shown
    from onecopy.guest.run_directory import GuestRecord
    from onecopy.guest.runtime import Runtime
    from onecopy.model import in_order

    host = Runtime.open()
    guests = shown(host)
    if every:
        guests = sorted(guests + host.ended(), key=lambda guest: in_order(guest.name))
    print_list(
        listing,
        msgspec.to_builtins(guests),
        GuestRecord.__struct_fields__,
        table=lambda rows: _print(msgspec.convert(rows, list[GuestRecord]), every),
    )
    count = 0 if every or listing.by_script else len(ended_guests.names(host.run))
    if count:
        have = "1 guest has" if count == 1 else f"{count} guests have"
        print_line(f"{have} ended: `onecopy ps --all`", sys.stderr)


def _print(guests: Sequence[GuestRecord], every: bool) -> None:
    print_table(
        [*_HEADINGS, *(["STATE"] if every else [])],
        [[*_row(guest), *([_state(guest)] if every else [])] for guest in guests],
    )
    running = [guest for guest in guests if not guest.ended]
    for reason in reasons(running):
        print_line(reason)
    for guest in running:
        if guest.note:
            print_line(f"{guest.name}: {guest.note}; `onecopy stop {guest.name}` ends it")


def _row(guest: GuestRecord) -> list[str]:
    until = (guest.ended.at or guest.ended.found) if guest.ended else time.time()
    return [
        guest.name,
        guest.kind,
        guest.source or "-",
        guest.accel or "-",
        "-" if guest.ended else str(guest.pid),
        duration(max(until - guest.started, 0)),
        duration(guest.start_seconds),
        ",".join(f"{host}->{port}" for host, port in guest.publish) or "-",
    ]


def _state(guest: GuestRecord) -> str:
    """Return ``running``, or the time and reason of the end; a killed QEMU records no time."""
    if not guest.ended:
        return guest.kind if guest.kind == "lost" else "running"
    when = duration(max(time.time() - (guest.ended.at or guest.ended.found), 0))
    found = "" if guest.ended.at else "found "
    return f"{found}ended {when} ago: {guest.ended.reason}"
