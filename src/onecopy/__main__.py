"""The command's entry: the only place that ends the process."""

import os
import sys


def main() -> None:
    """Run the command line and exit with its documented code (docs/reference/exit-codes.md)."""
    from onecopy.cli import main as cli_main
    from onecopy.cli.signals import ignore

    if os.environ.get("ONECOPY_DEBUG") != "1":
        # What Python tells besides of what went wrong meanwhile; the error itself is told.
        sys.unraisablehook = lambda _: None
        sys.excepthook = _told_shortly
    try:
        code = cli_main()
    except KeyboardInterrupt:
        code = 130
    # Python's own end takes a while, with no handlers any more.
    ignore()
    sys.exit(code)


def _told_shortly(kind: type[BaseException], error: BaseException, _: object) -> None:
    from onecopy.printable import printable

    said = printable(str(error))
    print(f"onecopy: internal error: {kind.__name__}: {said}", file=sys.stderr)


if __name__ == "__main__":
    main()
