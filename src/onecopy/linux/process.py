"""One process: its state, command line, CPU time and page tables (proc(5)).

Not here: its memory map (``smaps``), and what makes a process a guest.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from onecopy.errors import NotFound
from onecopy.linux.files import ROOT, no_process, number, read_of_process

#: Larger than any command line of QEMU.
_CMDLINE_LIMIT = 1 << 20
_UIDS = re.compile(rb"^Uid:\t[0-9]+\t([0-9]{1,10})\t", re.MULTILINE)
_SIZES = re.compile(rb"^(\w+):\s+([0-9]{1,15}) kB$", re.MULTILINE)


#: Indexes of the fields after the name: flags, utime, stime, starttime, vsize.
_FIELDS = (6, 11, 12, 19, 20)
_PARENT = re.compile(rb"^PPid:\t([0-9]{1,10})$", re.MULTILINE)
_PF_KTHREAD = 0x00200000


def capabilities(root: Path = ROOT) -> int:
    """Return this process's effective capabilities (capabilities(7))."""
    status = (root / "proc/self/status").read_text()
    found = re.search(r"^CapEff:\s+([0-9a-f]+)$", status, re.MULTILINE)
    return int(found[1], 16) if found else 0


class Stat(msgspec.Struct, frozen=True):
    """The fields of /proc/PID/stat that onecopy uses (proc_pid_stat(5))."""

    #: One letter; ``Z`` is a zombie: ended, but not reaped.
    state: str
    user_ticks: int
    system_ticks: int
    #: The start in clock ticks since the host's boot: with the pid, the process's identity.
    start_ticks: int
    #: The kernel's PF_ flags (include/linux/sched.h).
    flags: int = 0
    #: Bytes of address space; 0 for a kernel thread and for a process that is ending.
    virtual: int = 0

    @property
    def is_kernel_thread(self) -> bool:
        """Whether it is a kernel thread; no process can set this flag for itself."""
        return bool(self.flags & _PF_KTHREAD)


class Memory(msgspec.Struct, frozen=True):
    """Memory sizes in bytes from /proc/PID/status, which any user may read.

    A value is None if this kernel does not report it, or the process is a zombie.

    Source:
        proc_pid_status(5).
    """

    anonymous: int | None
    files: int | None
    shared_memory: int | None
    swapped: int | None
    page_tables: int | None


def parse_stat(text: bytes) -> Stat | None:
    """Parse a stat file; return None if it is truncated, as for a process that is ending."""
    # The command's name is in parentheses and may contain any bytes, `) ` included.
    fields = text[text.rfind(b")") + 2 :].split()
    figures = [number(fields[index]) for index in _FIELDS if index + 1 < len(fields)]
    if len(figures) < len(_FIELDS) or None in figures or len(fields[0]) != 1:
        return None
    flags, user, system, start, virtual = (each or 0 for each in figures)
    return Stat(fields[0].decode(errors="replace"), user, system, start, flags, virtual)


def stat(pid: int, root: Path = ROOT) -> Stat:
    """Return the process's state and times.

    Raises:
        NotFound: the process does not exist.
        Unreadable: the kernel refused to read the file.
    """
    text = read_of_process(pid, "stat", root)
    found = None if text is None else parse_stat(text)
    if found is None:
        raise no_process(pid)
    return found


def require(pid: int, start_ticks: int | None = None, root: Path = ROOT) -> None:
    """Require that the process runs and has memory, so that data read before is complete.

    Args:
        start_ticks: the start time that identifies the process, in case its pid was reused.

    Raises:
        NotFound: the process has ended or is another one.
    """
    text = read_of_process(pid, "stat", root)
    if text is None:
        # Recorded trees of /proc may lack this file.
        return
    found = parse_stat(text)
    if found is None or found.state in "ZX" or not found.virtual:
        raise no_process(pid)
    if start_ticks not in (None, found.start_ticks):
        raise no_process(pid)


def exists(pid: int, root: Path = ROOT) -> bool:
    """Whether the process runs; False for a zombie."""
    try:
        return stat(pid, root).state not in "ZX"
    except NotFound:
        return False


def is_same(pid: int, start_ticks: int, root: Path = ROOT) -> bool:
    """Whether ``pid`` still is the process with that start time."""
    try:
        return stat(pid, root).start_ticks == start_ticks
    except NotFound:
        return False


def cpu_seconds(pid: int, root: Path = ROOT) -> float:
    """Return the CPU time of all threads in seconds, user and system.

    Raises:
        NotFound: the process does not exist.
    """
    return cpu_seconds_of(stat(pid, root))


def cpu_seconds_of(figures: Stat) -> float:
    """Return the CPU time in seconds from figures that were read before."""
    return (figures.user_ticks + figures.system_ticks) / os.sysconf("SC_CLK_TCK")


def start_time(pid: int, root: Path = ROOT) -> float:
    """Return the start of the process in seconds since the host's boot.

    Raises:
        NotFound: the process does not exist.
    """
    return stat(pid, root).start_ticks / os.sysconf("SC_CLK_TCK")


def cmdline(pid: int, root: Path = ROOT) -> list[str]:
    """Return the process's command line; empty for a zombie.

    The process may have changed it and its length, since it is the process's own memory (prctl(2),
    PR_SET_MM). So only the first MiB is read.

    Raises:
        NotFound: the process does not exist.
        NotPermitted: this user may not read it.
    """
    text = read_of_process(pid, "cmdline", root, most=_CMDLINE_LIMIT, cut=True)
    if text is None:
        raise no_process(pid)
    if not text:
        return []
    return [arg.decode(errors="surrogateescape") for arg in text.removesuffix(b"\0").split(b"\0")]


def parent(pid: int, root: Path = ROOT) -> int:
    """Return the process's parent; 0 if it has none in this PID namespace.

    Raises:
        NotFound: the process does not exist.
    """
    found = _PARENT.search(read_of_process(pid, "status", root) or b"")
    if found is None:
        raise no_process(pid)
    return int(found[1])


def owner(pid: int, root: Path = ROOT) -> int | None:
    """Return the effective user id of the process; None if the kernel does not say.

    The owner of its directory in /proc would not do: that is root for a process that is not
    dumpable.

    Raises:
        NotFound: the process does not exist.
    """
    found = _UIDS.search(read_of_process(pid, "status", root) or b"")
    return None if found is None else int(found[1])


def memory(pid: int, root: Path = ROOT) -> Memory:
    """Return the process's memory by kind: cheaper than smaps, and less exact.

    Raises:
        NotFound: the process does not exist.
    """
    kib = dict(_SIZES.findall(read_of_process(pid, "status", root) or b""))
    names = (b"RssAnon", b"RssFile", b"RssShmem", b"VmSwap", b"VmPTE")
    return Memory(*(int(kib[name]) << 10 if name in kib else None for name in names))


def page_table_bytes(pid: int, root: Path = ROOT) -> int | None:
    """Return the bytes of the process's page tables (VmPTE); None if the kernel does not say.

    Raises:
        NotFound: the process does not exist.
    """
    return memory(pid, root).page_tables


async def wait_for_end(pidfd: int, timeout: float | None) -> bool:
    """Wait up to ``timeout`` seconds for the end of a process; return whether it has ended."""
    # Most readers of /proc need no event loop, and it takes long to import.
    import asyncio

    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        async with asyncio.timeout(timeout):
            await gone.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True
