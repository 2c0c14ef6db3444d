"""A process that keeps parts of files in memory: ``python -m onecopy.linux.page_locker``.

It reads one JSON object from standard input: ``{"files": [[path, size, [[first byte, bytes], ...]],
...], "record": path}``. It writes its identity to the record, locks the parts (mlock(2)), writes
one JSON object to standard output, and waits for a signal. It keeps all inherited descriptors open.
It imports few modules, because it stays in memory.

Not here: starting and ending it (guest/pagecache/pin.py).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from onecopy.linux.process import stat

_HUGE = 2 << 20
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25  # Linux 6.1
_PROT_NONE, _MAP_FIXED = 0, 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p


def main() -> None:
    """Lock the files named on standard input and wait for a signal."""
    request = json.load(sys.stdin)
    try:
        me = {"pid": os.getpid(), "start_ticks": stat(os.getpid()).start_ticks}
        Path(request["record"]).write_text(json.dumps(me))
        _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
        result = lock([(Path(path), size, extents) for path, size, extents in request["files"]])
    except OSError as error:
        result = {"errno": error.errno, "error": str(error)}
    # If the command that started this process was killed, the pipe is broken and the error ends
    # this process too.
    print(json.dumps(result), flush=True)
    if "errno" in result:
        sys.exit(1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    while True:
        signal.pause()


def lock(files: Sequence[tuple[Path, int, Sequence[Sequence[int]]]]) -> dict[str, object]:
    """Map and lock parts of files, in huge pages if the kernel can.

    Args:
        files: (path, size, extents) of each file; an extent is (first byte, bytes).

    Returns:
        ``locked`` in bytes, ``huge`` for the bytes mapped as huge pages, and ``collapse``, the
        reason why the kernel made no huge pages, or "".

    Raises:
        OSError: a file cannot be mapped or locked.
    """
    locked, refused = 0, ""
    for path, size, extents in files:
        address = _map(path, size)
        for start, length in extents:
            _raise_on_error(
                _libc.mlock(ctypes.c_void_p(address + start), ctypes.c_size_t(length)), "mlock"
            )
            locked += length
            refused = _collapse(address, start, length) or refused
    return {"locked": locked, "huge": _huge_bytes(), "collapse": refused}


def _map(path: Path, size: int) -> int:
    """Map a file aligned for huge pages; return its address. The mapping is permanent."""
    # Reserve address space anywhere, then map the file at an aligned address in it.
    room = _mmap(None, size + _HUGE, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    address = -(-room // _HUGE) * _HUGE
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = _mmap(address, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, fd)
        # Uncached parts are then read into huge pages if the file system supports that.
        _libc.madvise(ctypes.c_void_p(found), ctypes.c_size_t(size), _MADV_HUGEPAGE)
        return found
    finally:
        os.close(fd)


def _mmap(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    where, length = ctypes.c_void_p(address), ctypes.c_size_t(size)
    found = _libc.mmap(where, length, protection, flags, fd, ctypes.c_long(0))
    if found is None or found == _MAP_FAILED:
        _raise_on_error(-1, "mmap")
    return int(found)


def _collapse(address: int, start: int, length: int) -> str:
    """Have the kernel collapse a part into huge pages; return its reason for refusing, or ""."""
    first, end = -(-start // _HUGE) * _HUGE, (start + length) // _HUGE * _HUGE
    if first >= end:
        return ""
    where, size = ctypes.c_void_p(address + first), ctypes.c_size_t(end - first)
    if _libc.madvise(where, size, _MADV_COLLAPSE):
        return os.strerror(ctypes.get_errno())
    return ""


def _huge_bytes() -> int:
    text = Path("/proc/self/smaps").read_bytes()
    return sum(int(kib) << 10 for kib in re.findall(rb"^FilePmdMapped: +(\d+) kB$", text, re.M))


def _raise_on_error(result: int, call: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
