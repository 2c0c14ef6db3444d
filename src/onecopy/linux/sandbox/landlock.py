"""Landlock: restrict the files that a process can open by name (landlock(7)).

Rights that a newer ABI added are denied if the kernel supports them.

Not here: which files a VMM needs (vmm/confine.py).

Source:
    Linux Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from onecopy.linux.syscall import buffer, syscall

EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
TRUNCATE = 1 << 14
IOCTL_DEV = 1 << 15
#: The rights that apply to files other than directories.
_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
#: ABI version -> all file system rights up to that version.
_HANDLED = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
#: The ABI version in which rules can restrict listening on TCP ports, and that right.
BINDS_SINCE, _BIND_TCP = 4, 1 << 0
#: ABI version -> scopes: no signals to processes outside, and none of their abstract UNIX sockets.
_SCOPED = {6: 0b11}

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH, _RULE_NET_PORT = 1, 2


def abi() -> int:
    """Return the ABI version of the kernel's Landlock; 0 if Landlock is missing or disabled."""
    try:
        return syscall(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


def handled(version: int) -> int:
    """Return all file system rights of an ABI version; rulesets deny them by default."""
    return max((mask for since, mask in _HANDLED.items() if since <= version), default=0)


def attributes(version: int, *, binds: bool = False) -> bytes:
    """Pack struct landlock_ruleset_attr for an ABI version.

    Args:
        binds: restrict listening to the TCP ports that rules allow; connections stay unrestricted.
    """
    scoped = _SCOPED[6] if version >= 6 else 0
    size = 8 if version < BINDS_SINCE else 16 if version < 6 else 24
    return struct.pack("QQQ", handled(version), _BIND_TCP if binds else 0, scoped)[:size]


class Ruleset:
    """A set of rules for a process to apply to itself; close it afterwards."""

    def __init__(self, version: int, ports: Sequence[int] | None = None) -> None:
        """Create an empty ruleset.

        Args:
            ports: the only TCP ports on which the process may listen; 0 is any free port. A kernel
                with an ABI before BINDS_SINCE allows all ports.

        Raises:
            OSError: the kernel refused.
        """
        self._handled = handled(version)
        data = attributes(version, binds=ports is not None)
        self.fd = syscall(_CREATE_RULESET, buffer(data), len(data), 0)
        if ports is not None and version >= BINDS_SINCE:
            for port in ports:
                rule = buffer(struct.pack("QQ", _BIND_TCP, port))
                syscall(_ADD_RULE, self.fd, _RULE_NET_PORT, rule, 0)

    def allow(self, fd: int, rights: int) -> None:
        """Allow ``rights`` on an open file, or below an open directory.

        A file outside of any file system (memfd_create(2)) needs no rule and accepts none.

        Raises:
            OSError: the kernel refused.
        """
        rights &= self._handled
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _FILE
        rule = buffer(struct.pack("=Qi", rights, fd))
        try:
            syscall(_ADD_RULE, self.fd, _RULE_PATH_BENEATH, rule, 0)
        except OSError as error:
            if error.errno != errno.EBADFD:
                raise

    def allow_paths(self, paths: Iterable[Path | str], rights: int) -> None:
        """Allow ``rights`` on paths; links are followed, and missing files are skipped."""
        for path in paths:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                self.allow(fd, rights)
            finally:
                os.close(fd)

    def restrict_self(self) -> None:
        """Apply the rules to this thread permanently.

        The thread must have set no_new_privs.

        Raises:
            OSError: the kernel refused.
        """
        syscall(_RESTRICT_SELF, self.fd, 0)

    def close(self) -> None:
        """Close the ruleset; processes under it stay restricted."""
        os.close(self.fd)
