"""What a VMM may: nothing but what its guest needs, whatever the guest makes of it.

A new VMM is a user of its own (if root starts it: user.py), has no capability, and is under
Landlock and a seccomp filter. QEMU's own `-sandbox` comes on top. Not here: which files a guest is
made of (given.py).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from onecopy.errors import Incompatible
from onecopy.host import landlock, seccomp
from onecopy.host.landlock import EXECUTE, IOCTL_DEV, READ_DIR, READ_FILE, WRITE_FILE, Ruleset
from onecopy.host.syscall import (
    PR_GET_DUMPABLE,
    PR_GET_MEMORY_MERGE,
    PR_GET_THP_DISABLE,
    PR_SET_DUMPABLE,
    PR_SET_MEMORY_MERGE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_THP_DISABLE,
    prctl,
    randomize_no_addresses,
    set_capabilities,
    unshare_folder,
)
from onecopy.run import environment
from onecopy.vmm.user import KVM, User

#: QEMU, its libraries, its firmware, the time zone.
_PROGRAMS = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache")
_SHARED = ("share", "lib", "lib64")
#: What QEMU and its libraries ask about the host.
_HOST = (
    *("/dev/urandom", "/proc/filesystems"),
    *("/sys/devices/system/cpu", "/sys/devices/system/node"),
)
_NAME_SERVERS = Path("/etc/resolv.conf")
#: What QEMU allocates in blocks of some size, mostly queues of virtio devices, it hardly touches:
#: as mappings of their own untouched pages take no memory. One arena holds the rest of all threads.
_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=16384"}


@dataclass(frozen=True, slots=True)
class Confinement:
    """How one VMM is confined."""

    user: User | None
    capabilities: int
    """What it keeps of ours (capabilities(7))."""
    rights: Mapping[int, int]
    """Descriptor of ours -> what for the VMM may open its file (landlock.py)."""
    kvm: bool
    asks: bool
    """Whether opening a file for reading and writing is answered by us (readonly_ram.py)."""
    merge: bool = False
    """Whether KSM may merge its own memory, for which it gives up address randomisation."""


@dataclass(frozen=True, slots=True)
class Started:
    """A confined process, and where its questions come in if it asks."""

    process: subprocess.Popen[bytes]
    listener: int | None


def start(
    argv: Sequence[str], confinement: Confinement, folder: Path, output: int, passed: Sequence[int]
) -> Started:
    """Start a program that works in ``folder`` and writes to ``output``, confined.

    It inherits the descriptors ``passed`` and no other. Raises Incompatible if this host cannot
    confine it.

    Credentials, filters and rulesets belong to a thread, and a child has those of the thread that
    made it. So a thread of ours confines itself, starts the program and ends: no code of ours runs
    in a copy of this process, which takes longer the larger it is and is unsafe with other threads.
    """
    with ExitStack() as ends, ThreadPoolExecutor(1) as one:
        rules = _ruleset(argv[0], confinement)
        if rules:
            ends.callback(rules.close)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        ends.callback(os.close, null)
        ends.enter_context(_inherited_only(passed))
        ends.enter_context(_inherited_attributes())
        if confinement.merge:
            ends.enter_context(_mergeable())

        def work() -> Started:
            listener = _enter(confinement, rules, folder)
            try:
                return Started(_spawn(argv, null, output), listener)
            except BaseException:
                if listener is not None:
                    os.close(listener)
                raise

        return one.submit(work).result()


def _enter(confinement: Confinement, rules: Ruleset | None, folder: Path) -> int | None:
    """Confine this thread for ever."""
    try:
        # A working directory of its own, entered while it may.
        unshare_folder()
        os.chdir(folder)
        if confinement.user:
            confinement.user.become(confinement.capabilities)
        else:
            set_capabilities(confinement.capabilities)
        if confinement.merge:
            # Half of what is QEMU's own are addresses (relocated data): equal ones can be merged.
            randomize_no_addresses()
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        if rules:
            rules.restrict_self()
        return seccomp.install(filter_program(asks=confinement.asks), listen=confinement.asks)
    except OSError as error:
        raise Incompatible(
            f"QEMU cannot be confined on this host: {error.strerror}",
            hint="`onecopy doctor` says what this host can do",
        ) from error


def _spawn(argv: Sequence[str], null: int, output: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        stdin=null,
        stdout=output,
        stderr=output,
        env=environment(_ENVIRONMENT),
        # What is inherited is set already.
        close_fds=False,
        start_new_session=True,
    )


@contextmanager
def _inherited_only(passed: Sequence[int]) -> Iterator[None]:
    """Let new children inherit the standard descriptors and ``passed``, and no other."""
    # Popen's own closing lists /proc/self/fd in the child, which is confined by then.
    before = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own is closed by now
            before[int(entry.name)] = os.get_inheritable(int(entry.name))
    change = {fd: fd in passed for fd in before if fd > 2 and before[fd] != (fd in passed)}
    try:
        for fd, inherit in change.items():
            os.set_inheritable(fd, inherit)
        yield
    finally:
        for fd in change:
            os.set_inheritable(fd, before[fd])


@contextmanager
def _inherited_attributes() -> Iterator[None]:
    """Have what is the whole process's, and passes on to children, as QEMU should have it.

    No huge pages: QEMU asks for them for guest RAM and for its translation buffer, and a small
    guest would then occupy memory that it never touches. And back: a thread that becomes another
    user makes its process undumpable (PR_SET_DUMPABLE(2const)).
    """
    huge, dumpable = prctl(PR_GET_THP_DISABLE), prctl(PR_GET_DUMPABLE)
    prctl(PR_SET_THP_DISABLE, 1)
    try:
        yield
    finally:
        prctl(PR_SET_THP_DISABLE, huge)
        if dumpable == 1:
            prctl(PR_SET_DUMPABLE, 1)


@contextmanager
def _mergeable() -> Iterator[None]:
    """Let new children have all their memory open to KSM (PR_SET_MEMORY_MERGE(2const))."""
    try:
        before = prctl(PR_GET_MEMORY_MERGE)
        prctl(PR_SET_MEMORY_MERGE, 1)
    except OSError as error:
        raise Incompatible(
            "this kernel does not let KSM merge QEMU's own memory",
            hint="that takes Linux 6.4 with KSM; start the guests without --merge-vmm",
        ) from error
    try:
        yield
    finally:
        prctl(PR_SET_MEMORY_MERGE, before)


def _ruleset(binary: str, confinement: Confinement) -> Ruleset | None:
    version = landlock.abi()
    if not version:
        return None
    rules = Ruleset(version)
    try:
        own = Path(binary).resolve().parent
        below: list[Path | str] = [*_PROGRAMS, own, *(own.parent / name for name in _SHARED)]
        rules.allow_paths(below, READ_FILE | READ_DIR | EXECUTE)
        rules.allow_paths(_HOST, READ_FILE | READ_DIR)
        # Files there are replaced, not rewritten: the folder it is.
        rules.allow_paths([_NAME_SERVERS.resolve().parent], READ_FILE)
        if confinement.kvm:
            rules.allow_paths([KVM], READ_FILE | WRITE_FILE | IOCTL_DEV)
        for fd, right in confinement.rights.items():
            rules.allow(fd, right)
    except BaseException:
        rules.close()
        raise
    return rules


def filter_program(*, asks: bool) -> bytes:
    """The seccomp filter of a VMM.

    It has the sockets that it was given and TCP and UDP; with UNIX sockets of its own it could
    speak to any service of the host, or to the monitor of another guest. Files keep their rights:
    an ordinary user's VMM owns the blobs, and only from ABI 3 on Landlock knows what cuts a file
    off. io_uring would be a way round the filter; QEMU does without.

    QEMU asks for huge pages for all guest memory, files included. The kernel would then read 2 MiB
    and more of a segment for each page that a guest touches (do_sync_mmap_readahead() in
    mm/filemap.c), whatever PR_SET_THP_DISABLE says. QEMU does not mind a refusal.
    """
    inet = (socket.AF_INET, socket.AF_INET6)
    blocks = [
        seccomp.deny(seccomp.IO_URING_SETUP, errno.ENOSYS),
        seccomp.deny(seccomp.SOCKETPAIR, errno.EACCES),
        *(seccomp.deny(number, errno.EPERM) for number in seccomp.CHANGE_RIGHTS),
        seccomp.deny_if(seccomp.MADVISE, 2, mmap.MADV_HUGEPAGE, errno.EINVAL),
        seccomp.allow_only(seccomp.SOCKET, 0, inet, errno.EACCES),
    ]
    if asks:
        # Exactly these flags: what else QEMU opens it opens with O_CLOEXEC, or only to read.
        blocks.append(seccomp.ask_if(seccomp.OPENAT, 2, os.O_RDWR))
        blocks.append(seccomp.ask_if(seccomp.OPEN, 1, os.O_RDWR))
    return seccomp.program(*blocks)
