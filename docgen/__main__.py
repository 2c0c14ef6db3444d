"""Writes the manual pages: ``python -m docgen man DIRECTORY``."""

from __future__ import annotations

import sys
from pathlib import Path

from docgen import man


def main(args: list[str]) -> int:
    """Write the pages that ``args`` name; return the exit code."""
    if len(args) != 2 or args[0] != "man":
        print("usage: python -m docgen man DIRECTORY", file=sys.stderr)
        return 2
    man.write_all(Path(args[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
