"""/proc/meminfo: the host's memory.

Not here: which process uses it.

Source:
    Linux Documentation/filesystems/proc.rst, "meminfo".
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from msgspec.structs import replace

from onecopy.errors import Incompatible, as_root
from onecopy.linux.counters import zoneinfo
from onecopy.linux.files import ROOT
from onecopy.linux.files import read as read_file

_LINE = re.compile(rb"^(\w+): +([0-9]{1,15}) kB$", re.MULTILINE)


class MemInfo(msgspec.Struct, frozen=True):
    """The host's memory in bytes; None is a figure that this kernel does not report."""

    total: int | None
    free: int | None
    #: The kernel's estimate of what is available without swapping.
    available: int | None
    #: The page cache, tmpfs and shared memory included.
    cached: int | None
    #: The page cache of block devices.
    buffers: int | None
    #: Pages that are both in memory and in swap.
    swap_cached: int | None
    #: tmpfs and shared memory; part of ``cached``.
    shmem: int | None
    #: Slab memory: what the kernel can reclaim, and the rest.
    reclaimable: int | None
    unreclaimable: int | None
    per_cpu: int | None
    swap_total: int | None
    swap_free: int | None
    #: The page tables of all processes.
    page_tables: int | None
    #: The page tables of guests, which KVM maintains (Linux 6.1).
    secondary_page_tables: int | None
    kernel_stacks: int | None
    #: Free pages on per-CPU lists, which ``free`` leaves out (linux/counters/zoneinfo.py).
    on_lists: int | None = None

    @property
    def unused(self) -> int | None:
        """All free memory."""
        if self.free is None or self.on_lists is None:
            return None
        return self.free + self.on_lists


def parse(text: bytes) -> MemInfo:
    """Parse a meminfo file."""
    size = {key: int(kib) << 10 for key, kib in _LINE.findall(text)}
    return MemInfo(
        total=size.get(b"MemTotal"),
        free=size.get(b"MemFree"),
        available=size.get(b"MemAvailable"),
        cached=size.get(b"Cached"),
        buffers=size.get(b"Buffers"),
        swap_cached=size.get(b"SwapCached"),
        shmem=size.get(b"Shmem"),
        reclaimable=size.get(b"SReclaimable"),
        unreclaimable=size.get(b"SUnreclaim"),
        per_cpu=size.get(b"Percpu"),
        swap_total=size.get(b"SwapTotal"),
        swap_free=size.get(b"SwapFree"),
        page_tables=size.get(b"PageTables"),
        secondary_page_tables=size.get(b"SecPageTables"),
        kernel_stacks=size.get(b"KernelStack"),
    )


def read(root: Path = ROOT) -> MemInfo:
    """Read the host's memory.

    Raises:
        Incompatible: /proc is not mounted.
        NotPermitted: this user may not read the file.
    """
    text = read_file(root / "proc/meminfo")
    if text is None:
        raise Incompatible(
            f"{root / 'proc/meminfo'} does not exist", hint=as_root("mount -t proc proc /proc")
        )
    return replace(parse(text), on_lists=zoneinfo.free_on_lists(root))
