"""Memory files (memfd_create(2)): anonymous files in memory that vanish with their last user.

Not here: the uses (guest/backing.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from onecopy.errors import InsufficientResources, NotPermitted
from onecopy.linux.counters import meminfo
from onecopy.linux.files import ROOT, process_directory
from onecopy.linux.sparse import data_ranges
from onecopy.linux.syscall import punch_hole

_RESIZE = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
_CHUNK = 16 << 20


def create(name: str, size: int, content: Path | None = None, *, sealed: bool = False) -> int:
    """Create a memory file of ``size`` bytes that begins with ``content``; holes take no memory.

    Its size is sealed. With ``sealed`` its content is too.

    Raises:
        InsufficientResources: the content exceeds the host's available memory.
    """
    _require_memory(content)
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
    """Create a memory file with ``content`` that nobody can change."""
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
    """Create a memory file that another process can write to until `take` reads it."""
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def take(fd: int, room: int) -> bytes:
    """Read up to ``room`` bytes of a scratch file, and seal the file against further growth."""
    content = os.pread(fd, room, 0)
    # Free the memory, which a process that still has the file open would keep in use.
    os.ftruncate(fd, 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _RESIZE | fcntl.F_SEAL_SEAL)
    return content


def _require_memory(content: Path | None) -> None:
    needed = content.stat().st_blocks * 512 if content else 0
    available = meminfo.read().available
    if available is not None and needed > available:
        raise InsufficientResources(
            "memory", needed=needed, available=available, hint="stop guests that are not needed"
        )


def fill(fd: int, content: Path | None) -> None:
    """Replace the content of a memory file by ``content``, followed by zeroes."""
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
    """Open a process's memory file called ``name`` for reading and writing.

    Only a file of ``size`` bytes with a sealed size is accepted. A compromised VMM could otherwise
    shrink a file under the guests that map it.

    Returns:
        A descriptor; None if the process has no such file.

    Raises:
        NotPermitted: this user may not trace the process.
    """
    wanted = f"/memfd:{name} (deleted)"
    directory = process_directory(pid, root) / "fd"
    try:
        for entry in directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if str(entry.readlink()) == wanted and (fd := _open(entry, size)) is not None:
                    return fd
    except (FileNotFoundError, ProcessLookupError):
        return None
    except PermissionError as error:
        raise NotPermitted(
            f"cannot open the shared memory of process {pid}: {error.strerror}",
            hint="run the command as root or as the user who started the guests",
        ) from error
    return None


def _open(entry: Path, size: int) -> int | None:
    fd = os.open(entry, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    # F_GET_SEALS fails for a file that merely has such a name.
    with contextlib.suppress(OSError):
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if seals & _RESIZE == _RESIZE and os.fstat(fd).st_size == size:
            return fd
    os.close(fd)
    return None
