"""The command's entry: the only place that ends the process."""

import signal
import sys


def main() -> None:
    """Run the command line and exit with its documented code (docs/exit-codes.md)."""
    from onecopy.cli import main as cli_main

    code = cli_main()
    # All is done or undone; Python's own end takes a while, with no handlers any more.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


if __name__ == "__main__":
    main()
