"""seccomp filters: which system calls a process may make, and which a supervisor answers.

A filter sees the numbers in a call's arguments but no memory: it can check flags, not file names.
The numbers are those of x86_64.

Not here: what a VMM may call (vmm/confine.py).

Source:
    seccomp(2), seccomp_unotify(2), Linux Documentation/userspace-api/seccomp_filter.rst.
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
#: vfork, execve: how a program is started.
EXECUTE = (58, 59)
IO_URING_SETUP = 425
#: chmod, fchmod, fchmodat, fchmodat2; setxattr, lsetxattr, fsetxattr, setxattrat.
CHANGE_RIGHTS = (90, 91, 268, 452, 188, 189, 190, 463)
#: chown, fchown, lchown, fchownat; removexattr, lremovexattr, fremovexattr; utime, utimes,
#: futimesat, utimensat.
CHANGE_OWNERS = (92, 93, 94, 260, 197, 198, 199, 132, 235, 261, 280)
#: rename, mkdir, rmdir, link, unlink, symlink, mknod, and their "at" forms; renameat2, creat,
#: truncate.
CHANGE_NAMES = (82, 83, 84, 86, 87, 88, 133, 258, 259, 263, 264, 265, 266, 316, 85, 76)
#: Shared memory, semaphores and message queues (System V, POSIX), which outlive their creator.
LASTING = (*range(29, 32), *range(64, 72), 220, *range(240, 246))
#: ptrace, kcmp, process_vm_readv and _writev; kill, tkill, rt_sigqueueinfo, rt_tgsigqueueinfo;
#: migrate_pages, move_pages.
OTHER_PROCESSES = (101, 312, 310, 311, 62, 200, 129, 297, 256, 279)
#: Calls that change the host, or expose more of the kernel than programs need: syslog, uselib,
#: personality, sysfs, vhangup, modify_ldt, pivot_root, _sysctl, adjtimex, setrlimit, chroot, acct,
#: settimeofday, mount, umount2, swapon and _off, reboot, names, iopl, ioperm, modules, quotactl,
#: nfsservctl, lookup_dcookie, remap_file_pages; clock_settime, kexec_load, keys, ioprio_, inotify_,
#: unshare, splice, tee, vmsplice, perf_event_open, fanotify_, file handles, clock_adjtime, setns;
#: finit_module, memfd_create, kexec_file_load, bpf, execveat, userfaultfd, io_setup and related
#: calls.
RARE = (
    *(103, 134, 135, 139, 153, 154, 155, 156, 159, 160, 161, 163, 164, *range(165, 181), 212, 216),
    *(227, 246, *range(248, 256), 272, 275, 276, 278, 294, 298, 300, 301, 303, 304, 305, 308),
    *(313, 319, 320, 321, 322, 323, *range(206, 211)),
)
#: setpgid, setpriority, sched_setparam and _setscheduler, sched_setaffinity, mbind, set_mempolicy,
#: sched_setattr.
CHANGE_SCHEDULING = (109, 141, 142, 144, 203, 237, 238, 314)
#: From FIRST_NEW on, numbers are equal on all architectures and the kernel keeps adding calls. NEW
#: has those allowed: close_range, faccessat2, epoll_pwait2, futex_waitv, map_shadow_stack,
#: futex_wake and _wait, mseal.
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

# The instructions of classic BPF that filters need: a load, four tests and a return
# (linux/bpf_common.h).
_LOAD, _EQUAL, _NOT_LESS, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06

# _IOWR('!', 0, struct seccomp_notif), _IOWR('!', 1, struct seccomp_notif_resp) and
# _IOW('!', 3, struct seccomp_notif_addfd).
_RECEIVE, _SEND, _ADD_FD = 0xC0502100, 0xC0182101, 0x40182103


def program(*blocks: Sequence[bytes]) -> bytes:
    """Assemble a filter: the first block that matches a call decides; other calls are allowed.

    A call with another architecture's number ends the process. Numbers of x32 fail with ENOSYS. So
    neither circumvents the filter.
    """
    head = [_op(_LOAD, _ARCH), _op(_EQUAL, _ARCH_X86_64, 1, 0), _op(_RETURN, KILL)]
    head += [_op(_LOAD, _NR), _op(_NOT_LESS, _X32, 0, 1), _op(_RETURN, ERROR | errno.ENOSYS)]
    body = [op for block in blocks for op in block]
    return b"".join([*head, *body, _op(_RETURN, ALLOW)])


def deny(numbers: Sequence[int], error: int) -> list[bytes]:
    """Make at most 255 calls fail with ``error``."""
    *others, last = numbers
    tests = [_op(_EQUAL, number, len(others) - index, 0) for index, number in enumerate(others)]
    return [*tests, _op(_EQUAL, last, 0, 1), _op(_RETURN, ERROR | error)]


def deny_new(first: int, allowed: Sequence[int], error: int) -> list[bytes]:
    """Make all calls from number ``first`` on fail with ``error``, except those in ``allowed``."""
    last = len(allowed)
    tests = [_op(_EQUAL, number, last - index, 0) for index, number in enumerate(allowed)]
    block = [*tests, _op(_RETURN, ERROR | error), _op(_RETURN, ALLOW)]
    return [_op(_NOT_LESS, first, 0, len(block)), *block]


def deny_without(number: int, argument: int, bit: int, error: int) -> list[bytes]:
    """Make a call fail with ``error`` unless an argument has the ``bit``."""
    block = [_argument(argument), _op(_ANY_BIT, bit, 1, 0)]
    block += [_op(_RETURN, ERROR | error), _op(_RETURN, ALLOW)]
    return [_op(_EQUAL, number, 0, len(block)), *block]


def deny_unless_null(number: int, argument: int, error: int) -> list[bytes]:
    """Make a call fail with ``error`` unless a pointer argument is null.

    With the error 0 the call does nothing and reports success (seccomp(2), SECCOMP_RET_ERRNO).
    """
    high = _op(_LOAD, _ARGUMENTS + 8 * argument + 4)
    block = [_argument(argument), _op(_EQUAL, 0, 0, 2), high, _op(_EQUAL, 0, 1, 0)]
    block += [_op(_RETURN, ERROR | error), _op(_RETURN, ALLOW)]
    return [_op(_EQUAL, number, 0, len(block)), *block]


def allow_only(number: int, argument: int, values: Sequence[int], error: int) -> list[bytes]:
    """Make a call fail with ``error`` unless an argument (counted from 0) is in ``values``."""
    last = len(values)
    tests = [_op(_EQUAL, value, last - index, 0) for index, value in enumerate(values)]
    block = [_argument(argument), *tests, _op(_RETURN, ERROR | error), _op(_RETURN, ALLOW)]
    return [_op(_EQUAL, number, 0, len(block)), *block]


def deny_unless(number: int, argument: int, values: Sequence[int], error: int) -> list[bytes]:
    """Make a call fail with ``error`` unless an argument is listed; later blocks decide then."""
    last = len(values)
    tests = [_op(_EQUAL, value, last - index, 0) for index, value in enumerate(values)]
    block = [_argument(argument), *tests, _op(_RETURN, ERROR | error), _op(_LOAD, _NR)]
    return [_op(_EQUAL, number, 0, len(block)), *block]


def deny_if(number: int, argument: int, value: int, error: int) -> list[bytes]:
    """Make a call fail with ``error`` if an argument equals ``value``; allow it otherwise."""
    return _if(number, argument, value, ERROR | error)


def ask_if(number: int, argument: int, value: int) -> list[bytes]:
    """Have the listener answer a call if an argument equals ``value``; allow it otherwise."""
    return _if(number, argument, value, ASK)


def _if(number: int, argument: int, value: int, action: int) -> list[bytes]:
    block = [_argument(argument), _op(_EQUAL, value, 0, 1)]
    block += [_op(_RETURN, action), _op(_RETURN, ALLOW)]
    return [_op(_EQUAL, number, 0, len(block)), *block]


def _argument(number: int) -> bytes:
    # The low half of the argument: the kernel ignores the rest of an int.
    return _op(_LOAD, _ARGUMENTS + 8 * number)


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Pack struct sock_filter; jumps count the instructions to skip."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def can_ask() -> bool:
    """Whether the kernel lets another process answer calls (Linux 5.0)."""
    try:
        syscall(_SECCOMP, _GET_ACTION_AVAIL, 0, buffer(struct.pack("I", ASK)))
    except OSError:
        return False
    return True


def install(filter_program: bytes, *, listen: bool) -> int | None:
    """Apply a filter to this thread permanently.

    The thread must have set no_new_privs.

    Args:
        listen: create a listener that answers calls.

    Returns:
        The listener's descriptor, or None without a listener.

    Raises:
        OSError: the kernel refused; EBUSY means that the process already has a filter with a
            listener, as in some containers.
    """
    code = buffer(filter_program)
    fprog = buffer(struct.pack("HxxxxxxQ", len(filter_program) // 8, address(code)))
    flags = _FLAG_NEW_LISTENER if listen else 0
    result = syscall(_SECCOMP, _SET_MODE_FILTER, flags, fprog)
    return result if listen else None


def is_asked(listener: int) -> bool:
    """Whether a call is waiting for the listener's answer."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


def answer_with(listener: int, fd: int) -> None:
    """Let the waiting call return a duplicate of this process's descriptor (Linux 5.9).

    Raises:
        OSError: the kernel refused; ENOENT means that the caller has ended.
    """
    request = bytearray(80)
    fcntl.ioctl(listener, _RECEIVE, request)
    (call,) = struct.unpack_from("Q", request)
    # With bytes instead of a bytearray, fcntl.ioctl() would not return the call's result.
    number = fcntl.ioctl(listener, _ADD_FD, bytearray(struct.pack("QIIII", call, 0, fd, 0, 0)))
    fcntl.ioctl(listener, _SEND, struct.pack("QqiI", call, number, 0, 0))
