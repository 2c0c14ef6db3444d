"""The command's entry: the only place that ends the process."""

import sys


def main() -> None:
    """Run the command line and exit with its documented code (docs/exit-codes.md)."""
    from onecopy.cli import main as cli_main
    from onecopy.cli.signals import ignore

    code = cli_main()
    # Python's own end takes a while, with no handlers any more.
    ignore()
    sys.exit(code)


if __name__ == "__main__":
    main()
