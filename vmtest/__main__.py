"""The command line of script/test-kvm."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from onecopy.errors import OnecopyError
from vmtest import jobs
from vmtest.boot import tell
from vmtest.images import PROJECT, RELEASES

JOBS: dict[str, jobs.Job] = {
    "all": jobs.tests,
    "smoke": jobs.smoke,
    "support": jobs.make_support,
    "moved": jobs.moved,
    "bench": jobs.bench,
    "compare": jobs.compare,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="script/test-kvm",
        usage="%(prog)s [JOB] [--debian N] [--out DIRECTORY] [-- ARGUMENT...]",
        description="Run the VM tests under real KVM, in emulated hosts.",
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=list(JOBS),
        default="all",
        metavar="JOB",
        help="all: all VM tests (default); smoke: the few that script/test runs, too; support: "
        "regenerate docs/support.md; moved: its rows of systems that move between QEMU versions; "
        "bench: measure (script/bench, by default single starts and idle clones); compare: run "
        "script/compare, with few guests by default",
    )
    parser.add_argument(
        "--debian",
        type=int,
        choices=sorted(RELEASES),
        action="append",
        help="the host's Debian release; may be repeated (default: all; for smoke, moved and "
        "compare: 13)",
    )
    parser.add_argument(
        "--out", type=Path, default=PROJECT / "out/kvm", help="directory for results and logs"
    )
    # argparse cannot distinguish an optional last argument from the first one after "--".
    ours, inside = _split(sys.argv[1:])
    arguments = parser.parse_args(ours)
    arguments.inside = inside
    if not arguments.debian:
        one = arguments.what in ("smoke", "moved", "compare")
        arguments.debian = [13] if one else sorted(RELEASES, reverse=True)
    return arguments


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:end], arguments[end + 1 :]


def _all(arguments: argparse.Namespace) -> list[str]:
    found = []
    for number in arguments.debian:
        job = JOBS[arguments.what]
        problems = job(RELEASES[number], arguments.out, arguments.inside)
        found += [f"Debian {number}: {text}" for text in problems]
    return found


def main() -> int:
    """Run the job for each release; return 0 only if all passed."""
    arguments = _arguments()
    # Ends the emulated host, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        found = _all(arguments)
    except OnecopyError as error:
        tell(f"{error.message}\n{error.hint}".rstrip())
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    for text in found:
        tell(text)
    tell("FAILED" if found else "passed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
