"""onecopy ps"""

import time

import click

from onecopy.cli.output import duration, print_json, print_table
from onecopy.cli.params import json_option


@click.command("ps")
@json_option
def command(as_json: bool) -> None:
    """List the running guests.

    JSON: one object per guest, the fields of guest.json (docs/json.md).
    """
    import msgspec

    from onecopy.guest.host import Host
    from onecopy.guest.lost import shown

    guests = shown(Host.open())
    if as_json:
        print_json(msgspec.to_builtins(guests))
        return
    rows = [
        [
            guest.name,
            guest.kind,
            guest.source or "-",
            guest.accel or "-",
            str(guest.pid),
            duration(max(time.time() - guest.started, 0)),
            duration(guest.start_seconds),
            ",".join(f"{host}->{port}" for host, port in guest.publish) or "-",
        ]
        for guest in guests
    ]
    print_table(["NAME", "KIND", "SOURCE", "ACCEL", "PID", "UP", "STARTED IN", "PORTS"], rows)
    for reason in sorted({f"{each.accel}: {each.accel_reason}" for each in guests if each.accel}):
        print(reason)
    for guest in guests:
        if guest.note:
            print(f"{guest.name}: {guest.note}; `onecopy stop {guest.name}` ends it")
