"""File systems: whether one is local (statfs(2)), and whether an error means that it is full.

Not here: its free space (os.statvfs), and what must be on a local one (store/opening.py).
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

#: f_type -> name of file systems that others can change, lock or take away (linux/magic.h,
#: statfs(2)).
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
    0x786F4256: "VirtualBox shared folders",
}
# Its first member, f_type, is a long; its size is 120 bytes (asm-generic/statfs.h).
_STRUCT_SIZE = 256


def is_full(error: OSError) -> bool:
    """Return whether an error means that no block or inode is left, for anyone or for this user."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def remote_kind(path: Path) -> str | None:
    """Return the name of a file system that another machine or program may control, else None.

    Raises:
        OSError: the path cannot be accessed.
    """
    return remote_name(_type(path))


def remote_name(f_type: int) -> str | None:
    """Return the name of a type that another machine or program may control, else None."""
    # Some types are sign-extended.
    return _REMOTE.get(f_type & 0xFFFFFFFF)


def _type(path: Path) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = ctypes.create_string_buffer(_STRUCT_SIZE)
    if libc.statfs(os.fsencode(path), result):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return ctypes.c_long.from_buffer(result).value
