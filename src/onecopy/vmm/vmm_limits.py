"""The limits on a VMM: what its guest was given, plus an allowance for QEMU itself.

They grow with hot-plugged resources.

Not here: how a process is limited (linux/sandbox/rlimits.py, linux/cgroup.py).
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
from onecopy.vmm.logs import LOG_ROOM
from onecopy.vmm.spawn import as_user
from onecopy.vmm.vmm_user import User

#: QEMU's threads besides those of vCPUs, 64 of them for input and output (util/thread-pool.c).
_THREADS = 96
#: Bytes of QEMU's own memory, without the stacks of these threads, which are hardly touched.
_QEMU_MEMORY = 512 * MIB
#: Programs, libraries and temporary mappings.
_MAPPED = 1024 * MIB
#: Descriptors: at least two for each queue of a device, and one for each connection of the guest.
_FILES = 4096


def of_vmm(hardware: Hardware, spec: Launch, user: User | None) -> Limits:
    """Return the limits for a VMM before its start."""
    private = sum(slot.size for slot in hardware.segments if slot.mode is MapMode.COPY_ON_WRITE)
    private += hardware.memory + _qemu_memory(spec) + threads(hardware) * _stack()
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
        # These are counted for all processes of a user.
        found |= {rlimits.THREADS_OF_USER: threads(hardware), rlimits.SIGNALS_OF_USER: _THREADS}
    return found


def threads(hardware: Hardware) -> int:
    """Return the number of threads that a VMM may have."""
    return cpu_room(hardware.cpus) + _THREADS


def memory(hardware: Hardware, spec: Launch) -> int:
    """Return the bytes of host memory that a VMM may use, including its files in the page cache.

    The kernel charges a shared page to the VMM that touches it first, so saved RAM and segments
    count too.
    """
    times = 2 if spec.ram is Ram.COPY_ON_WRITE else 1
    return (
        hardware.memory * times + sum(slot.size for slot in hardware.segments) + _qemu_memory(spec)
    )


def _qemu_memory(spec: Launch) -> int:
    return _QEMU_MEMORY + (spec.translated if spec.accel == "tcg" else 0)


def _stack() -> int:
    """Return the bytes of a thread's stack (pthread_create(3)); QEMU inherits the limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return 2 * MIB if soft == resource.RLIM_INFINITY else soft


def let_map(pid: int, size: int, *, private: bool) -> None:
    """Allow a running VMM ``size`` more bytes of memory, up to its hard limits."""
    kinds = [rlimits.ADDRESS_SPACE, *([rlimits.PRIVATE] if private else [])]

    def work() -> None:
        for kind in kinds:
            rlimits.raise_to(pid, {kind: rlimits.of(pid, kind) + size})

    with contextlib.suppress(ProcessLookupError):
        as_user(pid, work)
    cgroup.raise_memory_limit(pid, size)


def file_room(pid: int) -> int:
    """Return the limit on the size of a running VMM's files in bytes.

    Raises:
        OSError: the kernel refused.
    """
    return as_user(pid, lambda: rlimits.of(pid, rlimits.FILE_SIZE))


def let_write(pid: int, size: int) -> None:
    """Allow a running VMM files of ``size`` bytes.

    Raises:
        OSError: the kernel refused.
    """
    as_user(pid, lambda: rlimits.raise_to(pid, {rlimits.FILE_SIZE: size}))


@contextlib.contextmanager
def writing_at_most(pid: int, size: int) -> Iterator[None]:
    """Allow a VMM with a paused guest files of ``size`` bytes during the context.

    Raises:
        OSError: the kernel refused.
    """
    before = file_room(pid)
    _limit_files(pid, size)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            _limit_files(pid, before)


def _limit_files(pid: int, size: int) -> None:
    as_user(pid, lambda: rlimits.apply(pid, {rlimits.FILE_SIZE: size}))
