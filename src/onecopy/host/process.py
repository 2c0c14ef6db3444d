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
from onecopy.host.files import ROOT, no_process, read_of_process

_SIZES = re.compile(rb"^(\w+):\s+([0-9]+) kB$", re.MULTILINE)


class Stat(msgspec.Struct, frozen=True):
    """What onecopy uses of /proc/PID/stat (proc_pid_stat(5))."""

    #: One letter; ``Z`` is a zombie: ended, but not yet waited for.
    state: str
    user_ticks: int
    system_ticks: int
    #: Clock ticks from the host's boot to this process's start: with the pid, its identity.
    start_ticks: int


class Memory(msgspec.Struct, frozen=True):
    """Sizes in /proc/PID/status (proc_pid_status(5)), which any user may read; bytes.

    None is what this kernel does not tell, or a zombie does not have.
    """

    anonymous: int | None
    files: int | None
    shared_memory: int | None
    swapped: int | None
    page_tables: int | None


def parse_stat(text: bytes) -> Stat:
    """The figures in the text of a stat file."""
    # The command's name stands in parentheses and may hold any byte, `) ` included.
    fields = text[text.rindex(b")") + 2 :].split()
    return Stat(
        state=fields[0].decode(),
        user_ticks=int(fields[11]),
        system_ticks=int(fields[12]),
        start_ticks=int(fields[19]),
    )


def stat(pid: int, root: Path = ROOT) -> Stat:
    """The process's state and times. Raises NotFound."""
    text = read_of_process(pid, "stat", root)
    if text is None:
        raise no_process(pid)
    return parse_stat(text)


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
    figures = stat(pid, root)
    return (figures.user_ticks + figures.system_ticks) / os.sysconf("SC_CLK_TCK")


def start_time(pid: int, root: Path = ROOT) -> float:
    """Seconds from the host's boot to the process's start. Raises NotFound."""
    return stat(pid, root).start_ticks / os.sysconf("SC_CLK_TCK")


def cmdline(pid: int, root: Path = ROOT) -> list[str]:
    """The arguments the process was started with; none for a zombie. Raises NotFound."""
    text = read_of_process(pid, "cmdline", root)
    if text is None:
        raise no_process(pid)
    return [arg.decode(errors="surrogateescape") for arg in text.split(b"\0")[:-1]]


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
