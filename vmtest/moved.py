"""Runs in a host: moves a saved system between the QEMUs of two releases (vmtest/moved).

moved save SUITE ACCEL DIRECTORY    save the system ``web`` into the store in DIRECTORY
moved start SUITE ACCEL DIRECTORY   start it here, and print the result as a Row (support.py)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from vmtest.flow import onecopy, save_web, tell_row, use_web


def main() -> None:
    """Save or start the system."""
    what, suite, accel, work = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
    os.environ["ONECOPY_HOME"] = str(work / "store")
    if what == "save":
        save_web(suite, accel, work)
    else:
        saved = json.loads(onecopy("inspect", "web"))
        tell_row(lambda: use_web(suite, accel), suite, accel, saved["config"]["qemu"])


if __name__ == "__main__":
    main()
