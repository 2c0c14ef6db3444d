"""What a VMM may: nothing but what its guest needs, whatever the guest makes of it.

A new VMM is a user of its own (if root starts it: vmm_user.py), has no capability, and is under
Landlock and a seccomp filter. QEMU's own `-sandbox` comes on top. Not here: which files a guest is
made of (passed_files.py), how a confined process is started (spawn.py).
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec

from onecopy.errors import Incompatible
from onecopy.linux.sandbox import landlock, seccomp
from onecopy.linux.sandbox.landlock import (
    EXECUTE,
    IOCTL_DEV,
    READ_DIR,
    READ_FILE,
    WRITE_FILE,
    Ruleset,
)
from onecopy.linux.sandbox.rlimits import Limits
from onecopy.linux.syscall import (
    PR_SET_NO_NEW_PRIVS,
    disable_address_randomisation,
    prctl,
    set_capabilities,
    unshare_directory,
)
from onecopy.vmm import name_servers
from onecopy.vmm.vmm_user import KVM, User

#: QEMU, its libraries, its firmware, the time zone.
_PROGRAMS = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache")
_SHARED = ("share", "lib", "lib64")
#: What QEMU and its libraries ask about the host.
_HOST = (
    *("/dev/urandom", "/proc/filesystems"),
    *("/sys/devices/system/cpu", "/sys/devices/system/node"),
)


class Confinement(msgspec.Struct, frozen=True):
    """How one VMM is confined."""

    user: User | None
    capabilities: int
    """What it keeps of ours (capabilities(7))."""
    rights: Mapping[int, int]
    """Descriptor of ours -> what for the VMM may open its file (linux/sandbox/landlock.py)."""
    kvm: bool
    asks: bool
    """Whether opening a file for reading and writing is answered by us (open_notify.py)."""
    merge: bool = False
    """Whether KSM may merge its own memory, for which it gives up address randomisation."""
    inet: bool = False
    """Whether it has TCP and UDP (QEMU's user-mode network)."""
    etc: Path | None = None
    """What it has in place of /etc (name_servers.py), and may read; None: the host's."""
    binds: tuple[int, ...] | None = None
    """The only TCP ports that it may listen at (0: any that is free); None: all."""
    limits: Limits = msgspec.field(default_factory=dict)
    """How much it may use (linux/sandbox/rlimits.py)."""


def enter(confinement: Confinement, rules: Ruleset | None, folder: Path) -> int | None:
    """Confine this thread for ever, in ``folder``; raise Incompatible.

    Returns where its questions come in, if it asks.
    """
    try:
        # A working directory of its own, entered while it may.
        if confinement.etc:
            name_servers.hide(confinement.etc)
        else:
            unshare_directory()
        os.chdir(folder)
        if confinement.user:
            confinement.user.become(confinement.capabilities)
        else:
            set_capabilities(confinement.capabilities)
        if confinement.merge:
            # Half of what is QEMU's own are addresses (relocated data): equal ones can be merged.
            disable_address_randomisation()
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        if rules:
            rules.restrict_self()
        return seccomp.install(filter_program(confinement), listen=confinement.asks)
    except OSError as error:
        raise Incompatible(
            f"QEMU cannot be confined on this host: {error.strerror}",
            hint="`onecopy doctor` says what this host can do",
        ) from error


def ruleset(binary: str, confinement: Confinement) -> Ruleset | None:
    """Landlock's rules for ``binary``, to be closed; None on a kernel without it."""
    version = landlock.abi()
    if not version:
        return None
    rules = Ruleset(version, confinement.binds)
    try:
        own = Path(binary).resolve().parent
        below: list[Path | str] = [*_PROGRAMS, own, *(own.parent / name for name in _SHARED)]
        rules.allow_paths(below, READ_FILE | READ_DIR | EXECUTE)
        rules.allow_paths(_HOST, READ_FILE | READ_DIR)
        if confinement.inet:
            rules.allow_paths([confinement.etc or name_servers.folder()], READ_FILE)
        if confinement.kvm:
            rules.allow_paths([KVM], READ_FILE | WRITE_FILE | IOCTL_DEV)
        for fd, right in confinement.rights.items():
            rules.allow(fd, right)
    except BaseException:
        rules.close()
        raise
    return rules


def filter_program(confinement: Confinement) -> bytes:
    """The seccomp filter: what no VMM has a use for.

    It denies by name what there was in Linux 5.3, and allows by name what came later. QEMU's own
    filter comes on top, and ends QEMU if it makes a process: vfork and execve alone cannot be
    denied here, since they start it.

    It has the sockets that it was given, and at most TCP and UDP; with UNIX sockets of its own it
    could speak to any service of the host, or to the monitor of another guest. Files keep their
    rights: an ordinary user's VMM owns the blobs, and only from ABI 3 on Landlock knows what cuts a
    file off. io_uring would be a way round the filter. Limits stay as they are.

    QEMU asks for huge pages for all guest memory, files included. The kernel would then read 2 MiB
    and more of a segment for each page that a guest touches (do_sync_mmap_readahead() in
    mm/filemap.c), whatever PR_SET_THP_DISABLE says. QEMU does not mind a refusal.
    """
    inet = (socket.AF_INET, socket.AF_INET6)
    blocks = [
        seccomp.deny((*seccomp.CHANGE_RIGHTS, *seccomp.CHANGE_OWNERS), errno.EPERM),
        seccomp.deny(seccomp.CHANGE_NAMES, errno.EACCES),
        seccomp.deny(seccomp.CHANGE_SCHEDULING, errno.EPERM),
        seccomp.deny(seccomp.LASTING, errno.EPERM),
        seccomp.deny(seccomp.OTHER_PROCESSES, errno.EPERM),
        seccomp.deny(seccomp.RARE, errno.EPERM),
        seccomp.deny([seccomp.FORK], errno.EPERM),
        seccomp.deny_without(seccomp.CLONE, 0, seccomp.CLONE_THREAD, errno.EPERM),
        seccomp.deny([seccomp.SOCKETPAIR], errno.EACCES),
        seccomp.deny_new(seccomp.FIRST_NEW, seccomp.NEW, errno.ENOSYS),
        seccomp.deny_if(seccomp.MADVISE, 2, mmap.MADV_HUGEPAGE, errno.EINVAL),
        # QEMU 10 would raise its limit of open files, and aborts if it is told that it may not.
        seccomp.deny_unless_null(seccomp.PRLIMIT, 2, 0),
    ]
    if confinement.inet:
        # Others have the kernel open sockets that are nobody's, so that no rule knows their user
        # (closed_network.py): MPTCP, SMC.
        protocols = (0, socket.IPPROTO_ICMP, socket.IPPROTO_TCP, socket.IPPROTO_UDP)
        blocks.append(seccomp.deny_unless(seccomp.SOCKET, 2, protocols, errno.EACCES))
        blocks.append(seccomp.allow_only(seccomp.SOCKET, 0, inet, errno.EACCES))
    else:
        blocks.append(seccomp.deny([seccomp.SOCKET], errno.EACCES))
    if confinement.asks:
        # Exactly these flags: what else QEMU opens it opens with O_CLOEXEC, or only to read.
        blocks.append(seccomp.ask_if(seccomp.OPENAT, 2, os.O_RDWR))
        blocks.append(seccomp.ask_if(seccomp.OPEN, 1, os.O_RDWR))
    return seccomp.program(*blocks)
