"""The command's entry: the only place that ends the process."""

import gc
import os
import sys


def main() -> None:
    """Run the command line and exit with its documented code (docs/reference/exit-codes.md)."""
    # Imports make many objects and no garbage, so Python need not look for it that often.
    gc.set_threshold(50_000)
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
    # Objects that are in use at the end need no last search for garbage: it takes 30 ms.
    gc.freeze()
    sys.exit(code)


def _told_shortly(kind: type[BaseException], error: BaseException, _: object) -> None:
    from onecopy.printable import printable

    said = printable(str(error))
    print(f"onecopy: internal error: {kind.__name__}: {said}", file=sys.stderr)


if __name__ == "__main__":
    main()
