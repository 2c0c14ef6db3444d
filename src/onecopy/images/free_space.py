"""Room on the disk: asked for before, and recognised when it ends in the middle.

Not here: making room (the store's garbage collection).
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onecopy.errors import CommandFailed, InsufficientResources

_HINT = "`onecopy rm` what is not needed, or put the store elsewhere with ONECOPY_HOME"
_SIGNS = ("No space left on device", "You don't have enough free space")


@contextmanager
def disk_space(folder: Path, needed: int) -> Iterator[None]:
    """Run the block if ``folder`` has room for ``needed`` bytes.

    Raises InsufficientResources: at once, or when the block fails because the disk is full.
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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise not_enough(folder, needed) from error
        raise


def disk_is_full(error: CommandFailed) -> bool:
    """Whether the program failed because the disk is full."""
    return any(sign in error.output for sign in _SIGNS)


def not_enough(folder: Path, needed: int) -> InsufficientResources:
    """What to raise if the disk of ``folder`` has no room for ``needed`` bytes."""
    free = shutil.disk_usage(folder).free
    return InsufficientResources("disk", needed=needed, available=free, hint=_HINT)
