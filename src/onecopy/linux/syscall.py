"""Linux system calls that Python has no function for, by number, through ctypes.

x86_64 only, as onecopy's hosts are. They concern the calling thread, but for `ignored`; the C
library's functions for credentials would change those of all threads (nptl(7)). Not here: what they
are for (linux/sandbox/landlock.py, linux/sandbox/seccomp.py, vmm/confine.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

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
_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000
_MS_BIND, _MS_REC, _MS_SLAVE = 1 << 12, 1 << 14, 1 << 19
_OPEN_TREE, _MOUNT_SETATTR = 428, 442
_AT_FDCWD, _AT_EMPTY_PATH, _OPEN_TREE_CLONE = -100, 0x1000, 1
_NOSUID, _NODEV, _NOEXEC = 2, 4, 8
_PERSONALITY, _ADDR_NO_RANDOMIZE, _PERSONALITY_NOW = 135, 0x0040000, 0xFFFFFFFF
_CAPABILITY_VERSION_3 = 0x20080522
#: Bytes of struct sigaction (glibc, bits/sigaction.h), whose first 8 are the handler.
_SIGACTION, _IGNORE = 152, 1

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


def unshare_mounts() -> None:
    """Have mounts (and a folder, as above) apart from all others, who do not see what is changed.

    What others mount and unmount is seen here, too (mount_namespaces(7)).
    """
    syscall(_UNSHARE, _CLONE_NEWNS)
    _checked(int(_libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None)))


def bind_mount(source: Path, target: Path) -> None:
    """Have a folder, with what is mounted in it, in place of another one; raise OSError."""
    flags = ctypes.c_ulong(_MS_BIND | _MS_REC)
    _checked(int(_libc.mount(os.fsencode(source), os.fsencode(target), None, flags, None)))


def open_without_devices(folder: Path) -> int:
    """Open a folder as a mount of its own, which nobody else sees and in which no device opens.

    open_tree(2), mount_setattr(2), Linux 5.12; raises OSError. Ends when it is closed.
    """
    name = buffer(os.fsencode(folder) + b"\0")
    fd = syscall(_OPEN_TREE, _AT_FDCWD, name, _OPEN_TREE_CLONE | os.O_CLOEXEC)
    try:
        attributes = struct.pack("4Q", _NOSUID | _NODEV | _NOEXEC, 0, 0, 0)
        empty = buffer(b"\0")
        syscall(_MOUNT_SETATTR, fd, empty, _AT_EMPTY_PATH, buffer(attributes), len(attributes))
    except BaseException:
        os.close(fd)
        raise
    return fd


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


@contextlib.contextmanager
def ignored(signal: int) -> Iterator[None]:
    """Have this process, and the children that it starts meanwhile, ignore a signal.

    As signal.signal() does, but from any thread.
    """
    before = ctypes.create_string_buffer(_SIGACTION)
    _checked(int(_libc.sigaction(signal, None, before)))
    if struct.unpack_from("Q", before)[0] == _IGNORE:
        yield
        return
    ignoring = buffer(struct.pack("Q", _IGNORE).ljust(_SIGACTION, b"\0"))
    _checked(int(_libc.sigaction(signal, ignoring, None)))
    try:
        yield
    finally:
        _checked(int(_libc.sigaction(signal, before, None)))


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
