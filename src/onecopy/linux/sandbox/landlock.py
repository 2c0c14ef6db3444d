"""Landlock: what a process may reach through file names, whoever it is (landlock(7)).

Linux Documentation/userspace-api/landlock.rst. Rights of a newer ABI are denied where the kernel
knows them. Not here: which files a VMM needs (vmm/confine.py).
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
#: What makes sense for something that is no folder.
_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
#: All file system rights up to the ABI in which they came.
_HANDLED = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
#: Since when a ruleset can say at which TCP ports a process may listen, and that right.
BINDS_SINCE, _BIND_TCP = 4, 1 << 0
#: No signals to, and no abstract UNIX sockets of, processes outside.
_SCOPED = {6: 0b11}

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH, _RULE_NET_PORT = 1, 2


def abi() -> int:
    """The version of Landlock that this kernel has; 0 if it has none, or it is switched off."""
    try:
        return syscall(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


def handled(version: int) -> int:
    """All file system rights that ``version`` of the ABI knows: denied, unless a rule allows."""
    return max((mask for since, mask in _HANDLED.items() if since <= version), default=0)


def attributes(version: int, *, binds: bool = False) -> bytes:
    """struct landlock_ruleset_attr as that version has it.

    Connections stay free; with ``binds`` only ports that a rule allows may be listened at.
    """
    scoped = _SCOPED[6] if version >= 6 else 0
    size = 8 if version < BINDS_SINCE else 16 if version < 6 else 24
    return struct.pack("QQQ", handled(version), _BIND_TCP if binds else 0, scoped)[:size]


class Ruleset:
    """Rules, until a process puts itself under them; to be closed."""

    def __init__(self, version: int, ports: Sequence[int] | None = None) -> None:
        """``ports`` are the only TCP ports that may be listened at (0: any that is free).

        A kernel whose ABI is older than BINDS_SINCE allows all.
        """
        self._handled = handled(version)
        data = attributes(version, binds=ports is not None)
        self.fd = syscall(_CREATE_RULESET, buffer(data), len(data), 0)
        if ports is not None and version >= BINDS_SINCE:
            for port in ports:
                rule = buffer(struct.pack("QQ", _BIND_TCP, port))
                syscall(_ADD_RULE, self.fd, _RULE_NET_PORT, rule, 0)

    def allow(self, fd: int, rights: int) -> None:
        """Allow ``rights`` on the file, or below the folder, that is open as ``fd``.

        A file that lies in no file system (memfd_create(2)) needs no rule, and can have none.
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
        """The same by name; links are followed, and what is not there is left out."""
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
        """Put this thread under them, for ever; it must have set no_new_privs. Raise OSError."""
        syscall(_RESTRICT_SELF, self.fd, 0)

    def close(self) -> None:
        """Let go of it; whoever is under it stays so."""
        os.close(self.fd)
