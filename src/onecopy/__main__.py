"""The command's entry: the only place that ends the process."""

import sys


def main() -> None:
    """Run the command line and exit with its documented code (docs/exit-codes.md)."""
    from onecopy.cli import main as cli_main

    sys.exit(cli_main())


if __name__ == "__main__":
    main()
