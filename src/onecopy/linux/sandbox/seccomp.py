"""seccomp filters: which system calls a process may make, and which another one answers for it.

seccomp(2), seccomp_unotify(2), Linux Documentation/userspace-api/seccomp_filter.rst; x86_64 only.
A filter sees numbers, not memory: flags yes, file names no. Not here: what a VMM may
(vmm/confine.py).
"""

from __future__ import annotations

import errno
import fcntl
import select
import struct
from collections.abc import Sequence

from onecopy.linux.syscall import address, buffer, syscall

#: System calls by number (Linux arch/x86/entry/syscalls/syscall_64.tbl).
OPEN, MADVISE, SOCKET, SOCKETPAIR, CLONE, FORK, OPENAT, PRLIMIT = 2, 28, 41, 53, 56, 57, 257, 302
IO_URING_SETUP = 425
#: chmod, fchmod, fchmodat, fchmodat2; setxattr, lsetxattr, fsetxattr, setxattrat.
CHANGE_RIGHTS = (90, 91, 268, 452, 188, 189, 190, 463)
#: chown, fchown, lchown, fchownat; removexattr, lremovexattr, fremovexattr; utime, utimes,
#: futimesat, utimensat.
CHANGE_OWNERS = (92, 93, 94, 260, 197, 198, 199, 132, 235, 261, 280)
#: rename, mkdir, rmdir, link, unlink, symlink, mknod, and with "at"; renameat2, creat, truncate.
CHANGE_NAMES = (82, 83, 84, 86, 87, 88, 133, 258, 259, 263, 264, 265, 266, 316, 85, 76)
#: Memory, semaphores and queues of System V; queues of POSIX: they outlive who makes them.
LASTING = (*range(29, 32), *range(64, 72), 220, *range(240, 246))
#: ptrace, kcmp, process_vm_readv and _writev; kill, tkill, rt_sigqueueinfo, rt_tgsigqueueinfo;
#: migrate_pages, move_pages.
OTHER_PROCESSES = (101, 312, 310, 311, 62, 200, 129, 297, 256, 279)
#: What changes the host, or shows more of the kernel than programs need: syslog, uselib,
#: personality, sysfs, vhangup, modify_ldt, pivot_root, _sysctl, adjtimex, setrlimit, chroot, acct,
#: settimeofday, mount, umount2, swapon and _off, reboot, names, iopl, ioperm, modules, quotactl,
#: nfsservctl, lookup_dcookie, remap_file_pages; clock_settime, kexec_load, keys, ioprio_, inotify_,
#: unshare, splice, tee, vmsplice, perf_event_open, fanotify_, file handles, clock_adjtime, setns;
#: finit_module, memfd_create, kexec_file_load, bpf, execveat, userfaultfd, io_setup and its like.
RARE = (
    *(103, 134, 135, 139, 153, 154, 155, 156, 159, 160, 161, 163, 164, *range(165, 181), 212, 216),
    *(227, 246, *range(248, 256), 272, 275, 276, 278, 294, 298, 300, 301, 303, 304, 305, 308),
    *(313, 319, 320, 321, 322, 323, *range(206, 211)),
)
#: setpgid, setpriority, sched_setparam and _setscheduler, sched_setaffinity, mbind, set_mempolicy,
#: sched_setattr.
CHANGE_SCHEDULING = (109, 141, 142, 144, 203, 237, 238, 314)
#: From here on numbers are the same on all architectures, and new calls come: close_range,
#: faccessat2, epoll_pwait2, futex_waitv, map_shadow_stack, futex_wake and _wait, mseal.
FIRST_NEW, NEW = 424, (436, 439, 441, 449, 453, 454, 455, 462)

CLONE_THREAD = 0x00010000

_SECCOMP = 317
_SET_MODE_FILTER, _GET_ACTION_AVAIL = 1, 2
_FLAG_NEW_LISTENER = 1 << 3

KILL = 0x80000000
ERROR = 0x00050000
ASK = 0x7FC00000
ALLOW = 0x7FFF0000

_ARCH_X86_64 = 0xC000003E
_X32 = 0x40000000
#: struct seccomp_data: nr, arch, instruction pointer, six arguments of 64 bits.
_NR, _ARCH, _ARGUMENTS = 0, 4, 16

# The loader, the four tests and the end that are needed of classic BPF (linux/bpf_common.h).
_LOAD, _EQUAL, _NOT_LESS, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06

# _IOWR('!', 0, struct seccomp_notif), _IOWR('!', 1, struct seccomp_notif_resp) and
# _IOW('!', 3, struct seccomp_notif_addfd).
_RECEIVE, _SEND, _ADD_FD = 0xC0502100, 0xC0182101, 0x40182103


def program(*blocks: Sequence[bytes]) -> bytes:
    """A filter: the first block that knows the call decides; else it is allowed.

    A call of another architecture ends the process, and the numbers of x32 do not exist: neither
    can be used to get round it.
    """
    head = [_op(_LOAD, _ARCH), _op(_EQUAL, _ARCH_X86_64, 1, 0), _op(_RETURN, KILL)]
    head += [_op(_LOAD, _NR), _op(_NOT_LESS, _X32, 0, 1), _op(_RETURN, ERROR | errno.ENOSYS)]
    body = [op for block in blocks for op in block]
    return b"".join([*head, *body, _op(_RETURN, ALLOW)])


def deny(numbers: Sequence[int], error: int) -> list[bytes]:
    """The calls fail with ``error``; at most 255 of them."""
    *others, last = numbers
    tests = [_op(_EQUAL, number, len(others) - place, 0) for place, number in enumerate(others)]
    return [*tests, _op(_EQUAL, last, 0, 1), _op(_RETURN, ERROR | error)]


def deny_new(first: int, allowed: Sequence[int], error: int) -> list[bytes]:
    """The calls from ``first`` on fail with ``error``, but for ``allowed``."""
    last = len(allowed)
    tests = [_op(_EQUAL, number, last - place, 0) for place, number in enumerate(allowed)]
    block = [*tests, _op(_RETURN, ERROR | error), _op(_RETURN, ALLOW)]
    return [_op(_NOT_LESS, first, 0, len(block)), *block]


def deny_without(number: int, argument: int, bit: int, error: int) -> list[bytes]:
    """The call fails with ``error`` unless the ``argument`` has the ``bit``."""
    block = [_argument(argument), _op(_ANY_BIT, bit, 1, 0)]
    block += [_op(_RETURN, ERROR | error), _op(_RETURN, ALLOW)]
    return [_op(_EQUAL, number, 0, len(block)), *block]


def deny_unless_null(number: int, argument: int, error: int) -> list[bytes]:
    """The call fails with ``error`` unless the ``argument``, a pointer, is null.

    With 0 nothing is done, and the caller is told that it was (seccomp(2), SECCOMP_RET_ERRNO).
    """
    high = _op(_LOAD, _ARGUMENTS + 8 * argument + 4)
    block = [_argument(argument), _op(_EQUAL, 0, 0, 2), high, _op(_EQUAL, 0, 1, 0)]
    block += [_op(_RETURN, ERROR | error), _op(_RETURN, ALLOW)]
    return [_op(_EQUAL, number, 0, len(block)), *block]


def allow_only(number: int, argument: int, values: Sequence[int], error: int) -> list[bytes]:
    """The call fails with ``error`` unless the ``argument`` (an int, counted from 0) is listed."""
    last = len(values)
    tests = [_op(_EQUAL, value, last - place, 0) for place, value in enumerate(values)]
    block = [_argument(argument), *tests, _op(_RETURN, ERROR | error), _op(_RETURN, ALLOW)]
    return [_op(_EQUAL, number, 0, len(block)), *block]


def deny_unless(number: int, argument: int, values: Sequence[int], error: int) -> list[bytes]:
    """The call fails with ``error`` unless the ``argument`` is listed; later blocks decide then."""
    last = len(values)
    tests = [_op(_EQUAL, value, last - place, 0) for place, value in enumerate(values)]
    block = [_argument(argument), *tests, _op(_RETURN, ERROR | error), _op(_LOAD, _NR)]
    return [_op(_EQUAL, number, 0, len(block)), *block]


def deny_if(number: int, argument: int, value: int, error: int) -> list[bytes]:
    """The call fails with ``error`` if the ``argument`` is ``value``; else it is allowed."""
    return _if(number, argument, value, ERROR | error)


def ask_if(number: int, argument: int, value: int) -> list[bytes]:
    """The listener answers the call if the ``argument`` is ``value``; else it is allowed."""
    return _if(number, argument, value, ASK)


def _if(number: int, argument: int, value: int, action: int) -> list[bytes]:
    block = [_argument(argument), _op(_EQUAL, value, 0, 1)]
    block += [_op(_RETURN, action), _op(_RETURN, ALLOW)]
    return [_op(_EQUAL, number, 0, len(block)), *block]


def _argument(number: int) -> bytes:
    # The low half, which is all that the kernel takes of an int.
    return _op(_LOAD, _ARGUMENTS + 8 * number)


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """struct sock_filter; the jumps count operations to skip."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def can_ask() -> bool:
    """Whether this kernel lets another process answer (since Linux 5.0)."""
    try:
        syscall(_SECCOMP, _GET_ACTION_AVAIL, 0, buffer(struct.pack("I", ASK)))
    except OSError:
        return False
    return True


def install(filter_program: bytes, *, listen: bool) -> int | None:
    """Put this thread under a filter, for ever; it must have set no_new_privs.

    With ``listen`` returns the descriptor at which calls are answered. Raises OSError; EBUSY means
    that a filter with a listener is there already, as in some containers.
    """
    code = buffer(filter_program)
    fprog = buffer(struct.pack("HxxxxxxQ", len(filter_program) // 8, address(code)))
    flags = _FLAG_NEW_LISTENER if listen else 0
    result = syscall(_SECCOMP, _SET_MODE_FILTER, flags, fprog)
    return result if listen else None


def is_asked(listener: int) -> bool:
    """Whether a call waits for an answer now."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


def answer_with(listener: int, fd: int) -> None:
    """Let the waiting call return a copy of our descriptor; raise OSError.

    Linux 5.9; the caller may have ended meanwhile (ENOENT).
    """
    request = bytearray(80)
    fcntl.ioctl(listener, _RECEIVE, request)
    (call,) = struct.unpack_from("Q", request)
    # A bytearray, since for bytes fcntl.ioctl() does not return what the call returned.
    number = fcntl.ioctl(listener, _ADD_FD, bytearray(struct.pack("QIIII", call, 0, fd, 0, 0)))
    fcntl.ioctl(listener, _SEND, struct.pack("QqiI", call, number, 0, 0))
