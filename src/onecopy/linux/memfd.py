"""Memory files (memfd_create(2)): memory with a descriptor and no name, gone with its last user.

Not here: what they are for (guest/backing.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from onecopy.errors import InsufficientResources, NotPermitted
from onecopy.linux.counters import meminfo
from onecopy.linux.files import ROOT, process_folder
from onecopy.linux.sparse import data_ranges
from onecopy.linux.syscall import punch_hole

_RESIZE = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
_CHUNK = 16 << 20


def create(name: str, size: int, content: Path | None = None, *, sealed: bool = False) -> int:
    """A new memory file of ``size`` bytes that starts with ``content``; holes take no memory.

    Nobody can change its size, or with ``sealed`` its content. Raises InsufficientResources.
    """
    _require(content)
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fill(fd, content)
        seals = _RESIZE | (fcntl.F_SEAL_WRITE if sealed else 0) | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def create_sealed(name: str, content: bytes) -> int:
    """A new memory file with ``content``, which nobody can change."""
    fd = scratch(name)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(fd, 0, os.SEEK_SET)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _RESIZE | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def scratch(name: str) -> int:
    """A new memory file for somebody to write to, until its content is taken."""
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def take(fd: int, room: int) -> bytes:
    """What was written to a scratch file, which nobody can write to any more; at most ``room``."""
    content = os.pread(fd, room, 0)
    # Whoever has it open still keeps nothing of it.
    os.ftruncate(fd, 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _RESIZE | fcntl.F_SEAL_SEAL)
    return content


def _require(content: Path | None) -> None:
    needed = content.stat().st_blocks * 512 if content else 0
    available = meminfo.read().available
    if available is not None and needed > available:
        raise InsufficientResources(
            "memory", needed=needed, available=available, hint="stop guests that are not needed"
        )


def fill(fd: int, content: Path | None) -> None:
    """Let a memory file hold ``content`` and zeroes after it; what it held before goes."""
    size = os.fstat(fd).st_size
    punch_hole(fd, 0, size)
    if content is None:
        return
    with content.open("rb", buffering=0) as file:
        for start, end in data_ranges(file.fileno(), size):
            os.lseek(fd, start, os.SEEK_SET)
            at = start
            while at < end:
                at += os.sendfile(fd, file.fileno(), at, min(end - at, _CHUNK))


def find(pid: int, name: str, size: int, root: Path = ROOT) -> int | None:
    """Open the memory file that a process has under ``name``, for reading and writing.

    None if it has none of that size that cannot be resized: what a guest made of its VMM must not
    take others with it. Raises NotPermitted without ptrace rights over the process.
    """
    wanted = f"/memfd:{name} (deleted)"
    folder = process_folder(pid, root) / "fd"
    try:
        for entry in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if str(entry.readlink()) == wanted and (fd := _open(entry, size)) is not None:
                    return fd
    except (FileNotFoundError, ProcessLookupError):
        return None
    except PermissionError as error:
        raise NotPermitted(
            f"may not look at the memory that process {pid} shares: {error.strerror}",
            hint="become root, or the user who started the guests",
        ) from error
    return None


def _open(entry: Path, size: int) -> int | None:
    fd = os.open(entry, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    # Of what only has such a name the kernel tells no seals.
    with contextlib.suppress(OSError):
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if seals & _RESIZE == _RESIZE and os.fstat(fd).st_size == size:
            return fd
    os.close(fd)
    return None
