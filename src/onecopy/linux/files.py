"""Read files of /proc and /sys, and write small records.

Not here: how the contents are parsed.
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

#: No counter of the kernel has more digits, and Python refuses to convert thousands of them.
_NUMBER = re.compile(rb"\s*(-?[0-9]{1,20})\s*")
#: The largest file is a process's memory map: 700 bytes for each of the 65,530 mappings that
#: vm.max_map_count allows.
_LARGEST = 128 << 20
_PIECE = 64 << 10
#: (device, inode): identifies a file independently of its name.
Identity = tuple[int, int]


def read(path: Path) -> bytes | None:
    """Read a whole file; return None if this kernel does not have it.

    Raises:
        NotPermitted: this user may not read it.
        ProcessLookupError: the process ended meanwhile.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise not_permitted(path) from error


def number(text: bytes | str | None) -> int | None:
    """Parse a text that is one integer; return None for anything else."""
    if text is None:
        return None
    found = _NUMBER.fullmatch(text.encode() if isinstance(text, str) else text)
    return int(found[1]) if found else None


def read_number(path: Path) -> int | None:
    """Read a file that holds one integer; return None if it is missing or holds anything else.

    Raises:
        NotPermitted: this user may not read it.
    """
    return number(read(path))


def process_directory(pid: int, root: Path = ROOT) -> Path:
    """Return the process's directory below ``root``, whether or not the process exists."""
    return root / "proc" / str(pid)


@contextmanager
def translating_errors(pid: int, path: Path) -> Iterator[None]:
    """Translate errors of reading a process's files, for all readers.

    Raises:
        NotFound: the process has ended.
        NotPermitted: this user may not read the file.
        Unreadable: any other error.
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
    pid: int, name: str, root: Path = ROOT, *, most: int = _LARGEST, cut: bool = False
) -> bytes | None:
    """Read /proc/PID/``name``; return None if this kernel does not have that file.

    Args:
        most: the limit in bytes.
        cut: return the first ``most`` bytes of a larger file instead of raising Unreadable.

    Raises:
        NotFound: the process does not exist.
        NotPermitted: this user may not read the file.
        Unreadable: the file is larger than the limit, or the kernel refused to read it.
    """
    directory = process_directory(pid, root)
    path = directory / name
    with translating_errors(pid, path):
        try:
            with path.open("rb", buffering=0) as file:
                return _read_up_to(file.fileno(), path, most, cut)
        except FileNotFoundError:
            if not directory.is_dir():
                raise
            return None


def _read_up_to(fd: int, path: Path, most: int, cut: bool) -> bytes:
    parts = []
    while most >= 0 and (part := os.read(fd, _PIECE)):
        going_on()
        parts.append(part[: most if cut else None])
        most -= len(part)
    if most < 0 and not cut:
        raise Unreadable(f"{path} is larger than {sum(map(len, parts)) >> 20} MiB")
    return b"".join(parts)


def read_range(path: Path, offset: int, size: int) -> bytes:
    """Read ``size`` bytes from ``offset``; the result is shorter at the end of the file.

    Raises:
        FileNotFoundError: the file does not exist.
        ProcessLookupError: the process has ended.
        NotPermitted: this user may not read it.
    """
    try:
        # Unbuffered, because these files require reads of whole 8-byte entries within the range.
        with path.open("rb", buffering=0) as file:
            return _read_all(file.fileno(), offset, size)
    except PermissionError as error:
        raise not_permitted(path) from error


def _read_all(fd: int, offset: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.pread(fd, min(size, _LARGEST), offset)
        if not part:
            break
        going_on()
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


def open_regular(path: Path, same_as: Identity | None = None) -> int:
    """Open a regular file for reading, and refuse all else: opening a FIFO would block.

    Args:
        same_as: the file that the path must still refer to.

    Raises:
        NotFound: the file does not exist or was replaced.
        NotPermitted: this user may not read it.
        InvalidInput: it is not a regular file or cannot be opened.
    """
    try:
        # O_PATH has no side effects. The file is then opened through this descriptor, so that it is
        # the one that was checked.
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            found = os.fstat(place)
            if same_as not in (None, (found.st_dev, found.st_ino)):
                raise NotFound(f"{path} has been replaced by another file")
            if not stat.S_ISREG(found.st_mode):
                raise InvalidInput(f"{path} is not a regular file", hint="name a regular file")
            return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(place)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"the file {path} does not exist") from error
    except PermissionError as error:
        raise not_permitted(path) from error
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot open {str(path)[:80]!r}: {error}") from error


def replace(path: Path, data: bytes) -> None:
    """Replace a file atomically: readers see the old content or the new.

    Nothing is forced to disk, so this is for files that a crash of the host may lose.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{threading.get_native_id()}")
    temporary.write_bytes(data)
    temporary.rename(path)


def write_at(fd: int, data: bytes, offset: int) -> int:
    """Write all of ``data`` at ``offset``.

    Returns:
        The number of bytes written.

    Raises:
        OSError: the write failed.
    """
    done = 0
    while done < len(data):
        written = os.pwrite(fd, data[done:], offset + done)
        if not written:
            # Writing to the memory of a process that has ended writes 0 bytes, without an error.
            raise OSError(errno.EIO, "the write returned 0 bytes")
        done += written
    return done


def no_process(pid: int) -> NotFound:
    """Build the error for a process that has ended."""
    return NotFound(
        f"process {pid} does not exist", hint="it has ended; `onecopy ps` lists the guests"
    )


def not_permitted(path: Path) -> NotPermitted:
    """Build the error for a file that this user may not open."""
    return NotPermitted(
        f"cannot open {path}: permission denied",
        hint="run the command as root or as the guest's user",
    )
