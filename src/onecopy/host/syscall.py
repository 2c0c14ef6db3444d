"""Linux system calls that Python has no function for, by number, through ctypes.

x86_64 only, as onecopy's hosts are. All of them concern the calling thread; the C library's
functions for credentials would change those of all threads (nptl(7)). Not here: what they are for
(landlock.py, seccomp.py, vmm/confine.py).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence

PR_GET_DUMPABLE = 3
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NO_NEW_PRIVS = 38
PR_SET_THP_DISABLE = 41
PR_GET_THP_DISABLE = 42
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4
PR_SET_MEMORY_MERGE = 67
PR_GET_MEMORY_MERGE = 68

_SETGROUPS, _SETRESUID, _SETRESGID, _CAPSET, _UNSHARE = 116, 117, 119, 126, 272
_PIDFD_GETFD = 438
_FALLOCATE, _KEEP_SIZE, _PUNCH_HOLE = 285, 1, 2
_CLONE_FS = 0x200
_PERSONALITY, _ADDR_NO_RANDOMIZE, _PERSONALITY_NOW = 135, 0x0040000, 0xFFFFFFFF
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def syscall(number: int, *arguments: int | ctypes.Array[ctypes.c_char] | None) -> int:
    """What the call returns; raise OSError. Buffers are passed by address."""
    passed = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(int(_libc.syscall(ctypes.c_long(number), *passed)))


def prctl(option: int, *arguments: int) -> int:
    """prctl(2); raise OSError."""
    passed = [*arguments, 0, 0, 0, 0][:4]
    return _checked(int(_libc.prctl(option, *map(ctypes.c_ulong, passed))))


def become(uid: int, gid: int, groups: Sequence[int]) -> None:
    """Take another user's numbers, for real, effective and saved; capabilities stay permitted.

    Raises OSError.
    """
    prctl(PR_SET_KEEPCAPS, 1)
    syscall(_SETGROUPS, len(groups), buffer(struct.pack(f"{len(groups)}I", *groups)))
    syscall(_SETRESGID, gid, gid, gid)
    syscall(_SETRESUID, uid, uid, uid)


def unshare_folder() -> None:
    """Have a working directory, root and umask apart from the process's other threads."""
    syscall(_UNSHARE, _CLONE_FS)


def randomize_no_addresses() -> None:
    """Programs that this thread executes lie at the same addresses each time (personality(2))."""
    now = syscall(_PERSONALITY, _PERSONALITY_NOW)
    syscall(_PERSONALITY, now | _ADDR_NO_RANDOMIZE)


def pidfd_getfd(pidfd: int, number: int) -> int:
    """A copy of another process's descriptor (pidfd_getfd(2), Linux 5.6); raise OSError.

    It takes ptrace rights over that process.
    """
    return syscall(_PIDFD_GETFD, pidfd, number, 0)


def punch_hole(fd: int, offset: int, size: int) -> None:
    """Make a range of a file read as zeroes and take no room (fallocate(2)); raise OSError."""
    syscall(_FALLOCATE, fd, _KEEP_SIZE | _PUNCH_HOLE, offset, size)


def set_capabilities(mask: int) -> None:
    """Have exactly the capabilities in ``mask`` (capabilities(7)) from now on; raise OSError.

    Programs that are executed inherit them, unless they are none.
    """
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    data = struct.pack("6I", low, low, low, high, high, high)
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    syscall(_CAPSET, buffer(header), buffer(data))
    for number in range(mask.bit_length()):
        if mask >> number & 1:
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number)


def buffer(data: bytes) -> ctypes.Array[ctypes.c_char]:
    """``data`` as something with an address."""
    return ctypes.create_string_buffer(data, len(data))


def address(data: ctypes.Array[ctypes.c_char]) -> int:
    """Where a buffer lies; it must be kept as long as this is used."""
    return ctypes.addressof(data)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
