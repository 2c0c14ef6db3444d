"""How the files of /proc and /sys are read, and small records written: one way for all.

Not here: what stands in them.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onecopy.errors import InvalidInput, NotFound, NotPermitted, Unreadable
from onecopy.linux.bounded_wait import going_on

ROOT = Path("/")

#: No counter of the kernel has more digits; Python refuses to read thousands of them.
_NUMBER = re.compile(rb"\s*(-?[0-9]{1,20})\s*")
#: A process's memory map is the largest: 700 bytes for each of the 65,530 mappings that
#: vm.max_map_count allows.
_MOST = 128 << 20
_PIECE = 64 << 10
#: (device, inode): which file it is, whatever its name.
Identity = tuple[int, int]


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


def number(text: bytes | str | None) -> int | None:
    """The one number in ``text``; None if there is none, or something else."""
    if text is None:
        return None
    found = _NUMBER.fullmatch(text.encode() if isinstance(text, str) else text)
    return int(found[1]) if found else None


def read_number(path: Path) -> int | None:
    """The one number in ``path``; None when this kernel has none there. Raises NotPermitted."""
    return number(read(path))


def process_folder(pid: int, root: Path = ROOT) -> Path:
    """The process's folder below ``root``; it may be gone."""
    return root / "proc" / str(pid)


@contextmanager
def asking(pid: int, path: Path) -> Iterator[None]:
    """Turn what the kernel answers of a process into errors of ours, for all readers.

    Raises NotFound when the process is gone, NotPermitted, and Unreadable for all else.
    """
    try:
        yield
    except (FileNotFoundError, ProcessLookupError) as error:
        raise no_process(pid) from error
    except PermissionError as error:
        raise not_permitted(path) from error
    except OSError as error:
        raise Unreadable(f"cannot read {path}: {error.strerror}") from error


def read_of_process(
    pid: int, name: str, root: Path = ROOT, *, most: int = _MOST, cut: bool = False
) -> bytes | None:
    """Everything in /proc/PID/``name``; None when this kernel has no such file.

    Raises NotFound when there is no such process, NotPermitted, and Unreadable when there are more
    than ``most`` bytes; with ``cut`` only the first of these are returned then.
    """
    folder = process_folder(pid, root)
    path = folder / name
    with asking(pid, path):
        try:
            with path.open("rb", buffering=0) as file:
                return _read_up_to(file.fileno(), path, most, cut)
        except FileNotFoundError:
            if not folder.is_dir():
                raise
            return None


def _read_up_to(fd: int, path: Path, most: int, cut: bool) -> bytes:
    parts = []
    while most >= 0 and (part := os.read(fd, _PIECE)):
        going_on()
        parts.append(part[: most if cut else None])
        most -= len(part)
    if most < 0 and not cut:
        raise Unreadable(f"{path} has more than {sum(map(len, parts)) >> 20} MiB")
    return b"".join(parts)


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
        part = os.pread(fd, min(size, _MOST), offset)
        if not part:
            break
        going_on()
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


def open_regular(path: Path, same_as: Identity | None = None) -> int:
    """Open a regular file for reading, and nothing else: a FIFO would keep us waiting.

    With ``same_as`` it is that file, whatever stands under its name now. Raises NotFound,
    NotPermitted, InvalidInput.
    """
    try:
        # Nothing is done to what is only looked at; what is then opened is the same.
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            found = os.fstat(place)
            if same_as not in (None, (found.st_dev, found.st_ino)):
                raise NotFound(f"{path} is another file by now")
            if not stat.S_ISREG(found.st_mode):
                raise InvalidInput(f"{path} is no regular file", hint="name a regular file")
            return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(place)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"no file {path}") from error
    except PermissionError as error:
        raise not_permitted(path) from error
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{str(path)[:80]!r} cannot be opened: {error}") from error


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
        written = os.pwrite(fd, data[done:], offset + done)
        if not written:
            # The memory of a process that has ended takes nothing, and says no more.
            raise OSError(errno.EIO, "nothing was written")
        done += written
    return done


def no_process(pid: int) -> NotFound:
    """The error for a process that is gone."""
    return NotFound(f"no process {pid}", hint="it has ended; `onecopy ps` lists the guests")


def not_permitted(path: Path) -> NotPermitted:
    """The error for a file that this user may not read or write."""
    return NotPermitted(f"may not open {path}", hint="run as root, or as the guest's own user")
