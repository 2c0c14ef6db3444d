"""onecopy ps"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from onecopy.cli.output import duration, print_json, print_line, print_table
from onecopy.cli.params import json_option

if TYPE_CHECKING:
    from onecopy.guest.run_directory import GuestRecord

_HEADINGS = ["NAME", "KIND", "SOURCE", "ACCEL", "PID", "UP", "STARTED IN", "PORTS"]


@click.command("ps")
@click.option(
    "-a", "--all", "every", is_flag=True, help="Also guests that ended by themselves, and why."
)
@json_option
def command(every: bool, as_json: bool) -> None:
    """List the running guests.

    A guest that ends by itself (it powers off, panics, its QEMU is killed...) stays known, with
    what it printed last, until `onecopy rm` or `stop` removes it, or another guest has its name;
    the newest 100 of them, until the host is booted.

    JSON: one object per guest, the fields of guest.json (docs/json.md).
    """
    import msgspec

    from onecopy.guest import ended_guests
    from onecopy.guest.lost_vmms import shown
    from onecopy.guest.runtime import Runtime
    from onecopy.model import in_order

    host = Runtime.open()
    guests = shown(host)
    if every:
        guests = sorted(guests + host.ended(), key=lambda guest: in_order(guest.name))
    if as_json:
        print_json(msgspec.to_builtins(guests))
        return
    print_table(
        [*_HEADINGS, *(["STATE"] if every else [])],
        [[*_row(guest), *([_state(guest)] if every else [])] for guest in guests],
    )
    running = [guest for guest in guests if not guest.ended]
    for reason in sorted({f"{each.accel}: {each.accel_reason}" for each in running if each.accel}):
        print_line(reason)
    for guest in running:
        if guest.note:
            print_line(f"{guest.name}: {guest.note}; `onecopy stop {guest.name}` ends it")
    if not every and (count := len(ended_guests.names(host.run))):
        have = "1 guest has" if count == 1 else f"{count} guests have"
        print_line(f"{have} ended: `onecopy ps -a`", sys.stderr)


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
    """``running``, or when it ended and why; QEMU does not note the time when it is killed."""
    if not guest.ended:
        return guest.kind if guest.kind == "lost" else "running"
    when = duration(max(time.time() - (guest.ended.at or guest.ended.found), 0))
    found = "" if guest.ended.at else "found "
    return f"{found}ended {when} ago: {guest.ended.reason}"
