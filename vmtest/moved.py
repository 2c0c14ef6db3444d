"""Runs in a host: half the way of a system from one release's QEMU to the other's (vmtest/moved).

moved save SUITE ACCEL FOLDER      save the system ``web`` into the store in FOLDER
moved start SUITE ACCEL FOLDER     start it here; what came of it is a Row (support.py)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from vmtest.flow import onecopy, save_web, tell_row, use_web


def main() -> None:
    """Do one half."""
    what, suite, accel, work = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
    os.environ["ONECOPY_HOME"] = str(work / "store")
    if what == "save":
        save_web(suite, accel, work)
    else:
        saved = json.loads(onecopy("inspect", "web"))
        tell_row(lambda: use_web(suite, accel), suite, accel, saved["config"]["qemu"])


if __name__ == "__main__":
    main()
