"""One process: its life, its command line, its CPU time, its page tables (proc(5)).

Not here: its memory map (``smaps``), and what makes a process a guest.
"""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import msgspec

from onecopy.errors import NotFound
from onecopy.linux.files import ROOT, no_process, number, read_of_process

#: More than any QEMU's.
_LONGEST = 1 << 20
_UIDS = re.compile(rb"^Uid:\t[0-9]+\t([0-9]{1,10})\t", re.MULTILINE)
_SIZES = re.compile(rb"^(\w+):\s+([0-9]{1,15}) kB$", re.MULTILINE)


#: Numbers of fields behind the name: flags, utime, stime, starttime, vsize.
_FIELDS = (6, 11, 12, 19, 20)
_PF_KTHREAD = 0x00200000


def capabilities(root: Path = ROOT) -> int:
    """What this process may (capabilities(7), effective)."""
    status = (root / "proc/self/status").read_text()
    found = re.search(r"^CapEff:\s+([0-9a-f]+)$", status, re.MULTILINE)
    return int(found[1], 16) if found else 0


class Stat(msgspec.Struct, frozen=True):
    """What onecopy uses of /proc/PID/stat (proc_pid_stat(5))."""

    #: One letter; ``Z`` is a zombie: ended, but not yet waited for.
    state: str
    user_ticks: int
    system_ticks: int
    #: Clock ticks from the host's boot to this process's start: with the pid, its identity.
    start_ticks: int
    #: The kernel's PF_ flags (include/linux/sched.h).
    flags: int = 0
    #: Bytes of its address space; 0 when it has none: a kernel thread, or one that is ending.
    virtual: int = 0

    @property
    def is_kernel_thread(self) -> bool:
        """Whether it is a thread of the kernel: no process can call itself one."""
        return bool(self.flags & _PF_KTHREAD)


class Memory(msgspec.Struct, frozen=True):
    """Sizes in /proc/PID/status (proc_pid_status(5)), which any user may read; bytes.

    None is what this kernel does not tell, or a zombie does not have.
    """

    anonymous: int | None
    files: int | None
    shared_memory: int | None
    swapped: int | None
    page_tables: int | None


def parse_stat(text: bytes) -> Stat | None:
    """The figures in the text of a stat file; None if it is cut off, as of a process that ends."""
    # The command's name stands in parentheses and may hold any byte, `) ` included.
    fields = text[text.rfind(b")") + 2 :].split()
    figures = [number(fields[place]) for place in _FIELDS if place + 1 < len(fields)]
    if len(figures) < len(_FIELDS) or None in figures or len(fields[0]) != 1:
        return None
    flags, user, system, start, virtual = (each or 0 for each in figures)
    return Stat(fields[0].decode(errors="replace"), user, system, start, flags, virtual)


def stat(pid: int, root: Path = ROOT) -> Stat:
    """The process's state and times. Raises NotFound, Unreadable."""
    text = read_of_process(pid, "stat", root)
    found = None if text is None else parse_stat(text)
    if found is None:
        raise no_process(pid)
    return found


def require(pid: int, start_ticks: int | None = None, root: Path = ROOT) -> None:
    """Raise NotFound unless the process runs and has memory: what was read of it is then whole.

    With ``start_ticks`` it is the one that started then, and no later one of the same number.
    """
    text = read_of_process(pid, "stat", root)
    if text is None:
        # Recorded without it.
        return
    found = parse_stat(text)
    if found is None or found.state in "ZX" or not found.virtual:
        raise no_process(pid)
    if start_ticks not in (None, found.start_ticks):
        raise no_process(pid)


def exists(pid: int, root: Path = ROOT) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return stat(pid, root).state not in "ZX"
    except NotFound:
        return False


def is_same(pid: int, start_ticks: int, root: Path = ROOT) -> bool:
    """Whether ``pid`` is the process that started then, and not a later one."""
    try:
        return stat(pid, root).start_ticks == start_ticks
    except NotFound:
        return False


def cpu_seconds(pid: int, root: Path = ROOT) -> float:
    """CPU time that the process used, user and system, all threads. Raises NotFound."""
    return cpu_seconds_of(stat(pid, root))


def cpu_seconds_of(figures: Stat) -> float:
    """The same, from figures that were read."""
    return (figures.user_ticks + figures.system_ticks) / os.sysconf("SC_CLK_TCK")


def start_time(pid: int, root: Path = ROOT) -> float:
    """Seconds from the host's boot to the process's start. Raises NotFound."""
    return stat(pid, root).start_ticks / os.sysconf("SC_CLK_TCK")


def cmdline(pid: int, root: Path = ROOT) -> list[str]:
    """The arguments the process was started with; none for a zombie. Raises NotFound, NotPermitted.

    It may have changed them: they are its own memory, as much as it says (prctl(2), PR_SET_MM). So
    no more than the first MiB is read.
    """
    text = read_of_process(pid, "cmdline", root, most=_LONGEST, cut=True)
    if text is None:
        raise no_process(pid)
    if not text:
        return []
    return [arg.decode(errors="surrogateescape") for arg in text.removesuffix(b"\0").split(b"\0")]


def owner(pid: int, root: Path = ROOT) -> int | None:
    """The user that the process acts as (its effective uid); None when not told.

    Not the owner of its folder in /proc: what is not dumpable seems to be root's. Raises NotFound.
    """
    found = _UIDS.search(read_of_process(pid, "status", root) or b"")
    return None if found is None else int(found[1])


def memory(pid: int, root: Path = ROOT) -> Memory:
    """The process's memory by kind; cheap beside smaps, and less exact. Raises NotFound."""
    kib = dict(_SIZES.findall(read_of_process(pid, "status", root) or b""))
    names = (b"RssAnon", b"RssFile", b"RssShmem", b"VmSwap", b"VmPTE")
    return Memory(*(int(kib[name]) << 10 if name in kib else None for name in names))


def page_table_bytes(pid: int, root: Path = ROOT) -> int | None:
    """Bytes of the process's page tables (VmPTE); None when not told. Raises NotFound."""
    return memory(pid, root).page_tables


async def wait_for_end(pidfd: int, timeout: float | None) -> bool:
    """Wait up to ``timeout`` seconds until the process behind a pidfd has ended; whether it has."""
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
