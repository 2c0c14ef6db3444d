"""onecopy report"""

from __future__ import annotations

import click

from onecopy.cli.output import print_json, print_table
from onecopy.cli.params import json_option


@click.command("report")
@json_option
def command(as_json: bool) -> None:
    """Show what the memory of all guests costs, by the kernel's counters.

    Figures are MiB; ? is what the kernel does not tell. What `onecopy pool` has prepared is in it,
    too, under names that begin with "pool.".
    """
    from onecopy.guest.host import Host
    from onecopy.guest.maps import guest_maps
    from onecopy.sharing import report

    host = Host.open()
    result = report.collect(guest_maps([*host.guests(), *host.prepared()]))
    if as_json:
        print_json(result.to_json())
        return
    columns = [column for column in report.COLUMNS if column.summed]
    rows = [
        [guest.name, *(_mib(report.value(guest, c)) for c in columns)] for guest in result.guests
    ]
    totals = result.totals
    rows.append(["in all", *(_mib(totals[column.key]) for column in columns)])
    print_table(["GUEST", *(column.heading for column in columns)], rows)
    print()
    blobs = [
        [blob.name[:40], blob.kind, _mib(blob.size), _mib(blob.resident), str(blob.guests)]
        for blob in result.blobs
    ]
    print_table(["SHARED FILE", "KIND", "SIZE", "RESIDENT", "GUESTS"], blobs)
    print("\nFigures are MiB; ? is what the kernel does not tell.")
    for column in columns:
        print(f"{column.heading}: {column.counts}")


def _mib(size: int | None) -> str:
    return "?" if size is None else f"{size / (1 << 20):.2f}"
