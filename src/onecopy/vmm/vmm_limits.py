"""How much of the host a VMM may use: what its guest was given, and room for QEMU itself.

More comes with what it is given while it runs. Not here: how a process is limited
(linux/sandbox/rlimits.py, linux/cgroup.py).
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

from onecopy.linux import cgroup
from onecopy.linux.sandbox import rlimits
from onecopy.linux.sandbox.rlimits import Limits
from onecopy.model import MIB
from onecopy.vmm.argv import Hardware, Launch, MapMode, Ram, cpu_room
from onecopy.vmm.spawn import as_user
from onecopy.vmm.vmm_user import User

#: Bytes of a log, and so of any file that is no disk (logs.py).
LOG_ROOM = 4 * MIB
#: QEMU's threads besides those of processors: 64 do input and output (util/thread-pool.c).
_THREADS = 96
#: Bytes of QEMU's own memory, without the stacks of these threads, which are hardly touched.
_OWN = 512 * MIB
#: Programs, libraries and what is mapped for a moment.
_MAPPED = 1024 * MIB
#: Descriptors: two and more for each queue of a device, one for each connection of the guest.
_FILES = 4096


def of_vmm(hardware: Hardware, spec: Launch, user: User | None) -> Limits:
    """The limits of a VMM that is about to be started."""
    private = sum(slot.size for slot in hardware.segments if slot.mode is MapMode.COPY_ON_WRITE)
    private += hardware.memory + _own(spec) + threads(hardware) * _stack()
    mapped = sum(slot.size for slot in hardware.segments if slot.mode is not MapMode.COPY_ON_WRITE)
    found = {
        rlimits.PRIVATE: private,
        rlimits.ADDRESS_SPACE: private + mapped + _MAPPED,
        rlimits.FILE_SIZE: LOG_ROOM,
        rlimits.OPEN_FILES: _FILES,
        rlimits.CORE: 0,
        rlimits.LOCKED: 0,
        rlimits.MESSAGES: 0,
    }
    if user:
        # These count what all processes of a user have.
        found |= {rlimits.THREADS_OF_USER: threads(hardware), rlimits.SIGNALS_OF_USER: _THREADS}
    return found


def threads(hardware: Hardware) -> int:
    """How many threads a VMM may have."""
    return cpu_room(hardware.cpus) + _THREADS


def memory(hardware: Hardware, spec: Launch) -> int:
    """Bytes of memory that the host may have in use for a VMM, page cache of its files included.

    What a guest shares is counted where it was first touched: the saved RAM and segments, too.
    """
    times = 2 if spec.ram is Ram.COPY_ON_WRITE else 1
    return hardware.memory * times + sum(slot.size for slot in hardware.segments) + _own(spec)


def _own(spec: Launch) -> int:
    return _OWN + (spec.translated if spec.accel == "tcg" else 0)


def _stack() -> int:
    """Bytes of a thread's stack (pthread_create(3)), which QEMU has as we have it."""
    most, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return 2 * MIB if most == resource.RLIM_INFINITY else most


def let_map(pid: int, size: int, *, private: bool) -> None:
    """Let a running VMM have ``size`` bytes more of memory; its hard limits stay."""
    kinds = [rlimits.ADDRESS_SPACE, *([rlimits.PRIVATE] if private else [])]

    def work() -> None:
        for kind in kinds:
            rlimits.raise_to(pid, {kind: rlimits.of(pid, kind) + size})

    with contextlib.suppress(ProcessLookupError):
        as_user(pid, work)
    cgroup.raise_memory_limit(pid, size)


def file_room(pid: int) -> int:
    """How many bytes a file of a running VMM may have; raise OSError."""
    return as_user(pid, lambda: rlimits.of(pid, rlimits.FILE_SIZE))


def let_write(pid: int, size: int) -> None:
    """Let a running VMM have files of ``size`` bytes; raise OSError."""
    as_user(pid, lambda: rlimits.raise_to(pid, {rlimits.FILE_SIZE: size}))


@contextlib.contextmanager
def writing_at_most(pid: int, size: int) -> Iterator[None]:
    """Let a VMM whose guest stands still have files of ``size`` bytes meanwhile; raise OSError."""
    before = file_room(pid)
    _limit_files(pid, size)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            _limit_files(pid, before)


def _limit_files(pid: int, size: int) -> None:
    as_user(pid, lambda: rlimits.apply(pid, {rlimits.FILE_SIZE: size}))
