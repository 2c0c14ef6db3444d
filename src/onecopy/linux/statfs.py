"""Whether a file system is of this machine: statfs(2).

Not here: how much room it has (os.statvfs), and who must not lie on which (store/opening.py).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

#: f_type -> name, of what may change, lock or vanish elsewhere (linux/magic.h, statfs(2)).
_REMOTE = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFE534D42: "SMB",
    0xFF534D42: "CIFS",
    0x01021997: "9p",
    0x00C36400: "Ceph",
    0x5346414F: "AFS",
    0x6B414653: "AFS",
    0x73757245: "Coda",
    0x0BD00BD0: "Lustre",
    0x47504653: "GPFS",
    0x65735546: "FUSE",
    0x786F4256: "VirtualBox's shared folders",
}
# Its first member, f_type, is a long; all of it has 120 bytes (asm-generic/statfs.h).
_ROOM = 256


def remote_kind(path: Path) -> str | None:
    """Name of the file system of ``path`` if it may be another machine's or program's; else None.

    Raises OSError.
    """
    return remote_name(_type(path))


def remote_name(f_type: int) -> str | None:
    """Name of a file system that may be another machine's or program's; else None."""
    # Some come sign-extended.
    return _REMOTE.get(f_type & 0xFFFFFFFF)


def _type(path: Path) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    told = ctypes.create_string_buffer(_ROOM)
    if libc.statfs(os.fsencode(path), told):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return ctypes.c_long.from_buffer(told).value
