"""Open a path below a directory without leaving it through a link (openat2(2), Linux 5.6).

Not here: the use (images/unpack.py).
"""

from __future__ import annotations

import os
import struct

from onecopy.linux.syscall import buffer, syscall

_OPENAT2 = 437
_NO_XDEV, _NO_MAGICLINKS, _BENEATH = 0x01, 0x02, 0x08
_RESOLVE = _NO_XDEV | _NO_MAGICLINKS | _BENEATH


def open_beneath(directory: int, path: bytes, flags: int) -> int:
    """Open ``path`` relative to an open directory; b"" is the directory itself.

    Raises:
        OSError: EXDEV if a link leads out of the directory or a mount point is in the way.
    """
    name = buffer((path or b".") + b"\0")
    how = buffer(struct.pack("QQQ", flags | os.O_CLOEXEC, 0, _RESOLVE))
    return syscall(_OPENAT2, directory, name, how, len(how))
