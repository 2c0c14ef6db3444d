"""`python -m tests.crash`: run the campaign, print what became of the jobs."""

from __future__ import annotations

import argparse
import secrets
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from onecopy.cli.tables import print_table
from tests.crash.campaign import Campaign, total

_COLUMNS = ("killed", "old", "new", "remains", "finished")


def main() -> int:
    """0 if every name was whole or absent each time, and every blob accounted for."""
    parser = argparse.ArgumentParser(
        prog="script/crash", description=__doc__.partition(": ")[2] if __doc__ else ""
    )
    parser.add_argument("--kills", type=int, default=1000, help="default: 1000")
    parser.add_argument("--seed", type=int, help="for the same jobs again")
    arguments = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="onecopy-crash-"))
    campaign = Campaign(folder, seed)
    try:
        while campaign.kills < arguments.kills:
            campaign.turn()
            _tell(campaign)
        campaign.end()
    except Exception:
        traceback.print_exc()
        print(f"after {campaign.kills} kills; the store is {folder / 'store'}", file=sys.stderr)
        return 1
    finally:
        campaign.abandon()
    shutil.rmtree(folder)
    _show(campaign, time.monotonic() - began)
    return 0


def _tell(campaign: Campaign) -> None:
    if sys.stderr.isatty():
        print(f"\r{campaign.kills} kills", end="", file=sys.stderr, flush=True)


def _show(campaign: Campaign, seconds: float) -> None:
    rows = [
        [kind, *(str(getattr(each, column)) for column in _COLUMNS)]
        for kind, each in campaign.tally.items()
    ]
    sums = total(campaign.tally)
    rows.append(["all", *(str(sums[column]) for column in _COLUMNS)])
    print_table(["JOB", *(column.upper() for column in _COLUMNS)], rows)
    print(
        f"{sums['killed']} kills in {seconds:.0f} s; {campaign.guests_ended} guests were killed, "
        f"too; at most {campaign.most_pending} artifacts were pending purge. After each every name "
        "was whole or absent, and every blob, lease and temporary file accounted for."
    )


if __name__ == "__main__":
    sys.exit(main())
