"""Opening a path below a folder, whatever links lie on the way: none leads out (openat2(2)).

Linux 5.6. Not here: what is done there (images/unpack.py).
"""

from __future__ import annotations

import os
import struct

from onecopy.linux.syscall import buffer, syscall

_OPENAT2 = 437
_NO_XDEV, _NO_MAGICLINKS, _BENEATH = 0x01, 0x02, 0x08
_RESOLVE = _NO_XDEV | _NO_MAGICLINKS | _BENEATH


def open_beneath(folder: int, path: bytes, flags: int) -> int:
    """Open ``path``, which is relative to the open ``folder``; b"" is that itself.

    Raises OSError: EXDEV if a link leads out of the folder, or something is mounted there.
    """
    name = buffer((path or b".") + b"\0")
    how = buffer(struct.pack("QQQ", flags | os.O_CLOEXEC, 0, _RESOLVE))
    return syscall(_OPENAT2, folder, name, how, len(how))
