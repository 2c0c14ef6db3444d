"""How the files of /proc and /sys are read, and small records written: one way for all.

Not here: what stands in them.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from onecopy.errors import NotFound, NotPermitted

ROOT = Path("/")


def read(path: Path) -> bytes | None:
    """Everything in ``path``; None when this kernel has no such file.

    Raises NotPermitted, and ProcessLookupError when the process ended meanwhile.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise not_permitted(path) from error


def read_number(path: Path) -> int | None:
    """The one number in ``path``; None when this kernel has no such file. Raises NotPermitted."""
    text = read(path)
    return None if text is None else int(text)


def process_folder(pid: int, root: Path = ROOT) -> Path:
    """The process's folder below ``root``; it may be gone."""
    return root / "proc" / str(pid)


def read_of_process(pid: int, name: str, root: Path = ROOT) -> bytes | None:
    """Everything in /proc/PID/``name``; None when this kernel has no such file.

    Raises NotFound when there is no such process, and NotPermitted.
    """
    folder = process_folder(pid, root)
    try:
        text = read(folder / name)
    except ProcessLookupError as error:
        raise no_process(pid) from error
    if text is None and not folder.is_dir():
        raise no_process(pid)
    return text


def read_range(path: Path, offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset`` on, fewer at the end of the file.

    Raises FileNotFoundError, ProcessLookupError, and NotPermitted.
    """
    try:
        # Unbuffered: the kernel wants whole 8-byte entries, and no more than were asked for.
        with path.open("rb", buffering=0) as file:
            return _read_all(file.fileno(), offset, size)
    except PermissionError as error:
        raise not_permitted(path) from error


def _read_all(fd: int, offset: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.pread(fd, size, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


def replace(path: Path, data: bytes) -> None:
    """Write a whole file: who reads it sees the old content or the new. Raises OSError.

    For what may be lost with the host: nothing is forced to the disk.
    """
    temporary = path.with_name(f"{path.name}.{threading.get_native_id()}")
    temporary.write_bytes(data)
    temporary.rename(path)


def write_at(fd: int, data: bytes, offset: int) -> int:
    """Write all of ``data`` from ``offset`` on; how many bytes that are. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
    return done


def no_process(pid: int) -> NotFound:
    """The error for a process that is gone."""
    return NotFound(f"no process {pid}", hint="it has ended; `onecopy ps` lists the guests")


def not_permitted(path: Path) -> NotPermitted:
    """The error for a file that this user may not read or write."""
    return NotPermitted(f"may not open {path}", hint="run as root, or as the guest's own user")
