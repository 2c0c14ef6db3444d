"""Checks free disk space before a step, and recognises a full disk during it.

Not here: freeing space (the store's garbage collection).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onecopy.errors import CommandFailed, InsufficientResources
from onecopy.linux.statfs import is_full

_HINT = "remove unused segments with `onecopy rm`, or set ONECOPY_HOME to a larger disk"
_SIGNS = ("No space left on device", "You don't have enough free space")


@contextmanager
def disk_space(folder: Path, needed: int) -> Iterator[None]:
    """Run the block if the disk of ``folder`` has ``needed`` bytes free.

    Raises:
        InsufficientResources: At once, or when the block fails because the disk is full.
    """
    if shutil.disk_usage(folder).free < needed:
        raise not_enough(folder, needed)
    try:
        yield
    except CommandFailed as error:
        if disk_is_full(error):
            raise not_enough(folder, needed) from error
        raise
    except OSError as error:
        if is_full(error):
            raise not_enough(folder, needed) from error
        raise


def disk_is_full(error: CommandFailed) -> bool:
    """Return whether a program failed because the disk is full."""
    return any(sign in error.output for sign in _SIGNS)


def not_enough(folder: Path, needed: int) -> InsufficientResources:
    """Return the error for a disk of ``folder`` that has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    return InsufficientResources("disk", needed=needed, available=free, hint=_HINT)
