"""Leftovers that a sweep cannot remove: warn once, and let the command go on.

Not here: what is swept (collect.py, workspace.py, lease.py).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Errors of the disk or of access to the store as a whole, not of one leftover.
_STORE_ERRORS = {errno.EIO, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
_warned: set[Path] = set()


@contextmanager
def tolerate_failure(path: Path) -> Iterator[None]:
    """Log an error about one leftover instead of raising it.

    Raises:
        OSError: the error concerns the whole store: a failing disk, for example.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _STORE_ERRORS:
            raise
        warn(path, error.strerror or "unknown error")


def warn(path: Path, reason: str) -> None:
    """Log a warning, once per path, that ``path`` is left; do nothing if ``reason`` is ""."""
    if reason and path not in _warned:
        _warned.add(path)
        import logging  # few commands need it

        log = logging.getLogger("onecopy")
        log.warning("onecopy: cannot remove %s: %s", ascii(str(path)), reason)
