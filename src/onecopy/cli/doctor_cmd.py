"""onecopy doctor"""

import click

from onecopy.cli.output import print_json, print_table, progress
from onecopy.cli.params import json_option


@click.command("doctor")
@json_option
def command(as_json: bool) -> int:
    """Check what this host can do.

    Fetches the guests' kernel if the store has none yet, to really run a probe guest under KVM.
    Exits with 1 if something is missing that onecopy cannot work without.
    """
    from onecopy.guest.observe.doctor import examine
    from onecopy.guest.runtime import Runtime

    host = Runtime.open()
    with progress() as tell:
        findings = examine(host, tell)
    if as_json:
        print_json([{"check": f.check, "state": f.state, "says": f.says} for f in findings])
    else:
        print_table(["CHECK", "STATE", ""], [[f.check, f.state, f.says] for f in findings])
    return int(any(finding.state == "missing" for finding in findings))
