"""onecopy doctor"""

import click

from onecopy.cli.commands import Command
from onecopy.cli.listing import Listing, listing_options, print_list
from onecopy.cli.output import progress
from onecopy.cli.tables import print_table


@click.command(
    "doctor",
    cls=Command,
    examples=[
        ("onecopy doctor", "Check this host."),
        ("onecopy doctor --filter state=missing", "List only what onecopy cannot work without."),
    ],
)
@listing_options
def command(listing: Listing) -> int:
    """Check what this host supports.

    To find out whether KVM works, the command boots a probe guest. If the store has no kernel for
    guests yet, the command fetches one. STATE is ok, limited (something works less well) or missing
    (onecopy cannot work). The command exits with 1 if something is missing.
    """
    from onecopy.guest.observe.doctor import examine
    from onecopy.guest.runtime import Runtime

    host = Runtime.open()
    with progress() as tell:
        findings = examine(host, tell)
    print_list(
        listing,
        [{"check": f.check, "state": f.state, "says": f.says} for f in findings],
        ("check", "state", "says"),
        name=lambda row: str(row["check"]),
        table=lambda rows: print_table(
            ["CHECK", "STATE", ""], [[row["check"], row["state"], row["says"]] for row in rows]
        ),
    )
    return int(any(finding.state == "missing" for finding in findings))
