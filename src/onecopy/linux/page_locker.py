"""`python -m onecopy.linux.page_locker`: a process that keeps parts of files in memory (mlock(2)).

It reads one JSON object from standard input, ``{"files": [[path, size, [[first byte, bytes], ...]],
...], "record": path}``, writes which process it is to the record, locks, writes one JSON object to
standard output, and waits for a signal. Descriptors that it inherits it keeps open. It imports
little, since it stays. Not here: who starts and ends it (guest/pagecache/pin.py).
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
    """Do as the module says."""
    wanted = json.load(sys.stdin)
    try:
        me = {"pid": os.getpid(), "start_ticks": stat(os.getpid()).start_ticks}
        Path(wanted["record"]).write_text(json.dumps(me))
        _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
        told = lock([(Path(path), size, extents) for path, size, extents in wanted["files"]])
    except OSError as error:
        told = {"errno": error.errno, "error": str(error)}
    # Nobody reads it any more if the command that started us was killed: then this ends us.
    print(json.dumps(told), flush=True)
    if "errno" in told:
        sys.exit(1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    while True:
        signal.pause()


def lock(files: Sequence[tuple[Path, int, Sequence[Sequence[int]]]]) -> dict[str, object]:
    """Map and lock parts of files, in huge pages where the kernel can.

    Returns ``locked`` and ``huge`` (bytes of this process that are mapped as huge pages), and
    ``collapse``: why the kernel made none, or "". Raises OSError.
    """
    locked, refused = 0, ""
    for path, size, extents in files:
        address = _map(path, size)
        for start, length in extents:
            _checked(
                _libc.mlock(ctypes.c_void_p(address + start), ctypes.c_size_t(length)), "mlock"
            )
            locked += length
            refused = _collapse(address, start, length) or refused
    return {"locked": locked, "huge": _huge_bytes(), "collapse": refused}


def _map(path: Path, size: int) -> int:
    """Map a file where huge pages fit; its address. The mapping stays."""
    # First room for it at any address, then the file at one that is aligned.
    room = _mmap(None, size + _HUGE, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    address = -(-room // _HUGE) * _HUGE
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = _mmap(address, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, fd)
        # What is not in memory yet is read into huge pages, where the file system has them.
        _libc.madvise(ctypes.c_void_p(found), ctypes.c_size_t(size), _MADV_HUGEPAGE)
        return found
    finally:
        os.close(fd)


def _mmap(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    where, length = ctypes.c_void_p(address), ctypes.c_size_t(size)
    found = _libc.mmap(where, length, protection, flags, fd, ctypes.c_long(0))
    if found is None or found == _MAP_FAILED:
        _checked(-1, "mmap")
    return int(found)


def _collapse(address: int, start: int, length: int) -> str:
    """Have the kernel make huge pages of a part; why it refused, or ""."""
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


def _checked(result: int, call: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
