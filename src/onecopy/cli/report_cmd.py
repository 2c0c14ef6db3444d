"""onecopy report"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from msgspec import to_builtins

from onecopy.cli.commands import Command
from onecopy.cli.output import duration, print_json, print_line
from onecopy.cli.params import json_option
from onecopy.cli.tables import print_table

if TYPE_CHECKING:
    from onecopy.sharing.account import GuestAccount
    from onecopy.sharing.cross_check import Check
    from onecopy.sharing.report import Column


@click.command(
    "report",
    cls=Command,
    examples=[
        ("onecopy report", "Show all guests, and other QEMU processes."),
        ("onecopy report --check", "Compare the sum with the host's own change in used memory."),
    ],
)
@click.option(
    "--check",
    "checked",
    is_flag=True,
    help="Also compare the sum of all parts with the change in the host's used memory.",
)
@json_option
def command(checked: bool, as_json: bool) -> None:
    """Show the memory of all guests, by the kernel's counters.

    Figures are MiB; ? is a figure that the kernel does not tell this user. Fork servers, from which
    QEMUs start, and other QEMU processes of the host have tables of their own. Guests that `onecopy
    pool` keeps ready have names that begin with "pool.".
    """
    from onecopy.guest.observe.accounts import checked_report, report_all
    from onecopy.guest.runtime import Runtime
    from onecopy.sharing import report

    host = Runtime.open()
    result, compared = checked_report(host) if checked else (report_all(host), None)
    if as_json:
        print_json(result.to_json() | ({"check": to_builtins(compared)} if compared else {}))
        return
    every = [*result.guests, *result.servers, *result.others]
    columns = [c for c in report.COLUMNS if c.summed and _tells(c, every)]
    _table("GUEST", columns, result.guests)
    for heading, others in (("FORK SERVER", result.servers), ("OTHER QEMU", result.others)):
        if others:
            print()
            _table(heading, columns, others)
    print()
    blobs = [
        [
            blob.name[:40],
            blob.kind,
            _mib(blob.size),
            _mib(blob.resident),
            _count(blob.guests),
            _count(blob.others),
        ]
        for blob in result.blobs
    ]
    print_table(["SHARED FILE", "KIND", "SIZE", "RESIDENT", "GUESTS", "OTHERS"], blobs)
    print("\nFigures are MiB; ? is unknown. Columns that are 0 for all are not shown.")
    for column in columns:
        print(f"{column.heading}: {column.counts}")
    for note in sorted({each.note for each in every if each.note}):
        print_line(f"?: {note}")
    for each in result.left_out:
        print_line(f"Skipped: {each}.")
    if compared:
        print()
        _print_check(compared)


def _print_check(compared: Check) -> None:
    from onecopy.sharing.cross_check import LINES

    ratio = "" if compared.ratio is None else f"{compared.ratio:+.1%}"
    rows = [
        [name, _mib(getattr(compared, key)), ratio if key == "difference" else "", counts]
        for key, name, counts in LINES
    ]
    since = duration(compared.seconds)
    print_table(["CHECK", "MiB", "", f"since the first guest started, {since} ago"], rows)
    if compared.left_out:
        print(f"{compared.left_out} other QEMU processes are not counted: they cannot be read.")


def _tells(column: Column, guests: Sequence[GuestAccount]) -> bool:
    from onecopy.sharing import report

    return not guests or any(report.value(guest, column) != 0 for guest in guests)


def _table(heading: str, columns: Sequence[Column], guests: Sequence[GuestAccount]) -> None:
    from onecopy.sharing import report

    rows = [[guest.name, *(_mib(report.value(guest, c)) for c in columns)] for guest in guests]
    sums = report.totals(guests)
    rows.append(["total", *(_mib(sums[column.key]) for column in columns)])
    print_table([heading, *(column.heading for column in columns)], rows)


def _mib(size: int | None) -> str:
    return "?" if size is None else f"{size / (1 << 20):.2f}"


def _count(number: int | None) -> str:
    return "?" if number is None else str(number)
