"""`python -m tests.soak`: start and stop thousands of clones, kill some; then nothing is left."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
import time
import traceback
from pathlib import Path

from onecopy.cli.tables import print_table
from onecopy.linux.counters import meminfo
from onecopy.model import format_size
from tests.soak.campaign import KINDS, Campaign
from tests.soak.setup import soaked


def main() -> int:
    """0 if all answered that were to, and nothing was left after any wave."""
    parser = argparse.ArgumentParser(
        prog="script/soak", description=__doc__.partition(": ")[2] if __doc__ else ""
    )
    parser.add_argument("--clones", type=int, default=2000, help="default: 2000")
    parser.add_argument("--wave", type=int, default=25, help="clones at once; default: 25")
    parser.add_argument("--seed", type=int, help="for the same waves again")
    only = "the event of each wave; default: drawn"
    parser.add_argument("--only", choices=KINDS, default="", help=only)
    arguments = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="onecopy-soak-") as folder:
        home = Path(folder) / "store"
        os.environ["ONECOPY_HOME"] = str(home)
        with soaked(home) as host:
            campaign = Campaign(host, seed, arguments.wave)
            before = meminfo.read()
            began = time.monotonic()
            try:
                while campaign.clones < arguments.clones:
                    campaign.turn(arguments.only)
                    print(f"{campaign.clones} clones", file=sys.stderr, flush=True)
            except Exception:
                traceback.print_exc()
                print(f"after {campaign.clones} clones", file=sys.stderr)
                return 1
            _show(campaign, time.monotonic() - began, before)
    return 0


def _show(campaign: Campaign, seconds: float, before: meminfo.MemInfo) -> None:
    print_table(["WAVES", ""], [[str(n), what] for what, n in sorted(campaign.waves.items())])
    print(
        f"{campaign.clones} clones were asked for in {seconds:.0f} s, {campaign.killed} of their "
        f"VMMs killed; {campaign.answers} answers with the right name. After each wave no process, "
        "run folder, socket, lease, blob, temporary file, mount, network interface or shared "
        "memory file was left."
    )
    if campaign.forked:
        rows = [[str(count), how] for how, count in campaign.forked.most_common()]
        print_table(["VMMS", "HOW THEY STARTED WHILE FORK SERVERS FAILED"], rows)
    after = meminfo.read()
    for what in ("available", "page_tables", "kernel_stacks"):
        was, now = getattr(before, what), getattr(after, what)
        if was is not None and now is not None:
            print(
                f"The host's {what.replace('_', ' ')}: {format_size(was)}, now {format_size(now)}"
            )


if __name__ == "__main__":
    sys.exit(main())
