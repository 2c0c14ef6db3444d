"""Confine a VMM to what its guest needs, even if the guest takes QEMU over.

A VMM that root starts runs as a user of its own (vmm_user.py). Each has no capabilities, and is
restricted by Landlock and a seccomp filter, in addition to QEMU's own `-sandbox`.

Not here: the guest's files (passed_files.py), and starting a confined process (spawn.py).
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

#: QEMU, its libraries, its firmware and the time zone.
_PROGRAMS = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache")
_SHARED = ("share", "lib", "lib64")
#: Files about the host that QEMU and its libraries read.
_HOST_FILES = (
    *("/dev/urandom", "/proc/filesystems"),
    *("/sys/devices/system/cpu", "/sys/devices/system/node"),
)


class Confinement(msgspec.Struct, frozen=True):
    """How one VMM is confined."""

    user: User | None
    capabilities: int
    """The capabilities that it keeps (capabilities(7))."""
    rights: Mapping[int, int]
    """Descriptor of this process -> how the VMM may open that file (linux/sandbox/landlock.py)."""
    kvm: bool
    asks: bool
    """Whether this process answers its requests to open a file read-write (open_notify.py)."""
    merge: bool = False
    """Whether KSM may merge its own memory, which requires disabling address randomisation."""
    inet: bool = False
    """Whether it may use TCP and UDP, for QEMU's user-mode network."""
    etc: Path | None = None
    """The directory that replaces /etc for it (name_servers.py); None for the host's."""
    binds: tuple[int, ...] | None = None
    """The only TCP ports on which it may listen (0: any free port); None for all."""
    limits: Limits = msgspec.field(default_factory=dict)
    """Its resource limits (linux/sandbox/rlimits.py)."""


def enter(confinement: Confinement, rules: Ruleset | None, folder: Path) -> int | None:
    """Confine this thread permanently, with the working directory ``folder``.

    Returns:
        The listener for the VMM's requests to open files, if it makes them.

    Raises:
        Incompatible: this host does not support the confinement.
    """
    try:
        # The thread gets a working directory of its own, and enters it while it still may.
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
            # Half of QEMU's memory contains addresses (relocated data). Equal addresses can be
            # merged.
            disable_address_randomisation()
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        if rules:
            rules.restrict_self()
        return seccomp.install(filter_program(confinement), listen=confinement.asks)
    except OSError as error:
        raise Incompatible(
            f"cannot confine QEMU on this host: {error.strerror}",
            hint="run `onecopy doctor` to see what this host supports",
        ) from error


def ruleset(binary: str, confinement: Confinement) -> Ruleset | None:
    """Build the Landlock rules for ``binary``, to be closed; None on a kernel without Landlock."""
    version = landlock.abi()
    if not version:
        return None
    rules = Ruleset(version, confinement.binds)
    try:
        own = Path(binary).resolve().parent
        below: list[Path | str] = [*_PROGRAMS, own, *(own.parent / name for name in _SHARED)]
        rules.allow_paths(below, READ_FILE | READ_DIR | EXECUTE)
        rules.allow_paths(_HOST_FILES, READ_FILE | READ_DIR)
        if confinement.inet:
            rules.allow_paths([confinement.etc or name_servers.directory()], READ_FILE)
        if confinement.kvm:
            rules.allow_paths([KVM], READ_FILE | WRITE_FILE | IOCTL_DEV)
        for fd, right in confinement.rights.items():
            rules.allow(fd, right)
    except BaseException:
        rules.close()
        raise
    return rules


def filter_program(confinement: Confinement, *, executes: bool = True) -> bytes:
    """Build the seccomp filter, which denies everything that no VMM needs.

    It denies by name the calls of Linux 5.3, and allows by name the later ones. QEMU's own filter
    also applies, and ends QEMU if it creates a process. vfork and execve can be denied only if they
    do not start QEMU (``executes``).

    Sockets: the VMM keeps those that it was given, and may create at most TCP and UDP ones. With
    UNIX sockets it could reach any service of the host, or the monitor of another guest.

    Files: permissions cannot be changed. The VMM of an ordinary user owns the blobs, and Landlock
    covers truncation only from ABI 3 on. io_uring would circumvent the filter. Resource limits
    cannot be changed.

    Huge pages: QEMU requests them for all guest memory, files included. For files the kernel would
    then read 2 MiB or more of a segment for each page that a guest touches
    (do_sync_mmap_readahead() in mm/filemap.c), whatever PR_SET_THP_DISABLE says. QEMU tolerates the
    refusal.
    """
    inet = (socket.AF_INET, socket.AF_INET6)
    blocks = [
        seccomp.deny((*seccomp.CHANGE_RIGHTS, *seccomp.CHANGE_OWNERS), errno.EPERM),
        seccomp.deny(seccomp.CHANGE_NAMES, errno.EACCES),
        seccomp.deny(seccomp.CHANGE_SCHEDULING, errno.EPERM),
        seccomp.deny(seccomp.LASTING, errno.EPERM),
        seccomp.deny(seccomp.OTHER_PROCESSES, errno.EPERM),
        seccomp.deny(seccomp.RARE, errno.EPERM),
        seccomp.deny([seccomp.FORK, *(() if executes else seccomp.EXECUTE)], errno.EPERM),
        seccomp.deny_without(seccomp.CLONE, 0, seccomp.CLONE_THREAD, errno.EPERM),
        seccomp.deny([seccomp.SOCKETPAIR], errno.EACCES),
        seccomp.deny_new(seccomp.FIRST_NEW, seccomp.NEW, errno.ENOSYS),
        seccomp.deny_if(seccomp.MADVISE, 2, mmap.MADV_HUGEPAGE, errno.EINVAL),
        # QEMU 10 tries to raise its limit of open files and aborts if that fails, so the call
        # pretends to succeed.
        seccomp.deny_unless_null(seccomp.PRLIMIT, 2, 0),
    ]
    if confinement.inet:
        # With other protocols (MPTCP, SMC) the kernel opens sockets that have no user, which the
        # rules (closed_network.py) would miss.
        protocols = (0, socket.IPPROTO_ICMP, socket.IPPROTO_TCP, socket.IPPROTO_UDP)
        blocks.append(seccomp.deny_unless(seccomp.SOCKET, 2, protocols, errno.EACCES))
        blocks.append(seccomp.allow_only(seccomp.SOCKET, 0, inet, errno.EACCES))
    else:
        blocks.append(seccomp.deny([seccomp.SOCKET], errno.EACCES))
    if confinement.asks:
        # Only exactly these flags: QEMU opens all other files with O_CLOEXEC, or read-only.
        blocks.append(seccomp.ask_if(seccomp.OPENAT, 2, os.O_RDWR))
        blocks.append(seccomp.ask_if(seccomp.OPEN, 1, os.O_RDWR))
    return seccomp.program(*blocks)
