"""What a sweep cannot remove: told once, and no reason for a command to fail.

Not here: what is swept (collect.py, workspace.py, lease.py).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger("onecopy")
#: These say that something is wrong with the disk or with the right to the store, not with one
#: leftover.
_NOT_ITS_OWN = {errno.EIO, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
_told: set[Path] = set()


@contextmanager
def going_on(path: Path) -> Iterator[None]:
    """Do something with the leftover ``path``; if that fails it is told, and nothing is raised.

    Raises OSError if it is not for the leftover's own sake: the disk fails, for example.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NOT_ITS_OWN:
            raise
        tell(path, error.strerror or "unknown error")


def tell(path: Path, why: str) -> None:
    """Say on standard error, once, that ``path`` is left and ``why``; "" is no reason to."""
    if why and path not in _told:
        _told.add(path)
        _log.warning("onecopy: %s cannot be removed: %s", ascii(str(path)), why)
