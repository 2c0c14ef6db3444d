"""Linux system calls for which Python has no function, by number through ctypes.

The numbers are those of x86_64, like onecopy's hosts. All but `ignored` affect only the calling
thread, whereas the C library's functions change the credentials of all threads (nptl(7)).

Not here: the uses (linux/sandbox/landlock.py, linux/sandbox/seccomp.py, vmm/confine.py).
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
#: Bytes of struct sigaction (glibc, bits/sigaction.h); the first 8 are the handler.
_SIGACTION, _IGNORE = 152, 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def syscall(number: int, *arguments: int | ctypes.Array[ctypes.c_char] | None) -> int:
    """Make a system call; buffers are converted by address.

    Returns:
        The result of the call.

    Raises:
        OSError: the call failed.
    """
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(int(_libc.syscall(ctypes.c_long(number), *converted)))


def prctl(option: int, *arguments: int) -> int:
    """Call prctl(2).

    Raises:
        OSError: the call failed.
    """
    converted = [*arguments, 0, 0, 0, 0][:4]
    return _checked(int(_libc.prctl(option, *map(ctypes.c_ulong, converted))))


def become(uid: int, gid: int, groups: Sequence[int]) -> None:
    """Set the real, effective and saved user and group; permitted capabilities stay.

    Raises:
        OSError: the kernel refused.
    """
    prctl(PR_SET_KEEPCAPS, 1)
    syscall(_SETGROUPS, len(groups), buffer(struct.pack(f"{len(groups)}I", *groups)))
    syscall(_SETRESGID, gid, gid, gid)
    syscall(_SETRESUID, uid, uid, uid)


def unshare_directory() -> None:
    """Give this thread its own working directory, root and umask."""
    syscall(_UNSHARE, _CLONE_FS)


def unshare_mounts() -> None:
    """Give this thread its own mount namespace, and its own working directory.

    Mounts of other processes still appear here (mount_namespaces(7)), but not the reverse.

    Raises:
        OSError: the kernel refused.
    """
    syscall(_UNSHARE, _CLONE_NEWNS)
    _checked(int(_libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None)))


def bind_mount(source: Path, target: Path) -> None:
    """Mount a directory, and the mounts in it, over another directory.

    Raises:
        OSError: the kernel refused.
    """
    flags = ctypes.c_ulong(_MS_BIND | _MS_REC)
    _checked(int(_libc.mount(os.fsencode(source), os.fsencode(target), None, flags, None)))


def open_without_devices(directory: Path) -> int:
    """Open a directory as a private mount in which no device file can be opened.

    The mount ends when the descriptor is closed. Needs Linux 5.12 (open_tree(2), mount_setattr(2)).

    Raises:
        OSError: the kernel refused.
    """
    name = buffer(os.fsencode(directory) + b"\0")
    fd = syscall(_OPEN_TREE, _AT_FDCWD, name, _OPEN_TREE_CLONE | os.O_CLOEXEC)
    try:
        attributes = struct.pack("4Q", _NOSUID | _NODEV | _NOEXEC, 0, 0, 0)
        empty = buffer(b"\0")
        syscall(_MOUNT_SETATTR, fd, empty, _AT_EMPTY_PATH, buffer(attributes), len(attributes))
    except BaseException:
        os.close(fd)
        raise
    return fd


def disable_address_randomisation() -> None:
    """Disable address randomisation for programs that this thread executes (personality(2))."""
    now = syscall(_PERSONALITY, _PERSONALITY_NOW)
    syscall(_PERSONALITY, now | _ADDR_NO_RANDOMIZE)


def pidfd_getfd(pidfd: int, number: int) -> int:
    """Duplicate a descriptor of another process (pidfd_getfd(2), Linux 5.6).

    Raises:
        OSError: the kernel refused; the right to trace the process is needed.
    """
    return syscall(_PIDFD_GETFD, pidfd, number, 0)


def punch_hole(fd: int, offset: int, size: int) -> None:
    """Free a range of a file, which then reads as zeroes (fallocate(2)).

    Raises:
        OSError: the kernel refused.
    """
    syscall(_FALLOCATE, fd, _KEEP_SIZE | _PUNCH_HOLE, offset, size)


def set_capabilities(mask: int) -> None:
    """Reduce the capabilities to those in ``mask`` (capabilities(7)).

    Programs that this thread executes inherit them.

    Raises:
        OSError: the kernel refused.
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
    """Have this process ignore a signal, and the children that it starts meanwhile.

    Unlike signal.signal() this works in any thread.
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
    """Return ``data`` as a buffer with an address."""
    return ctypes.create_string_buffer(data, len(data))


def address(data: ctypes.Array[ctypes.c_char]) -> int:
    """Return the address of a buffer; the caller must keep the buffer alive."""
    return ctypes.addressof(data)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
