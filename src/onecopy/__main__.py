"""The command's entry: the only place that ends the process."""

import contextlib
import gc
import os
import sys
from typing import NoReturn


def main() -> None:
    """Run the command line and exit with its documented code (docs/reference/exit-codes.md)."""
    # Imports make many objects and no garbage, so Python need not look for it that often.
    gc.set_threshold(50_000)
    from onecopy.later import put_off

    put_off()
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
    # Only the report of finished work is left.
    ignore()
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End the process without Python's own end, which destroys each object, in vain."""
    for stream in (sys.stdout, sys.stderr):
        # The command has reported a stream that cannot be written, unless it was interrupted.
        with contextlib.suppress(Exception):
            if stream:
                stream.flush()
    os._exit(code)


def _told_shortly(kind: type[BaseException], error: BaseException, _: object) -> None:
    from onecopy.printable import printable

    said = printable(str(error))
    print(f"onecopy: internal error: {kind.__name__}: {said}", file=sys.stderr)


if __name__ == "__main__":
    main()
