"""/proc/meminfo: the host's memory. Documentation/filesystems/proc.rst, "meminfo".

Not here: who uses it.
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
    """The host's memory, all in bytes; None is what this kernel does not tell."""

    total: int | None
    free: int | None
    #: The kernel's estimate of what can be had without swapping.
    available: int | None
    #: Page cache, tmpfs and shared memory included.
    cached: int | None
    #: Page cache of block devices.
    buffers: int | None
    #: Pages that are in memory and in swap.
    swap_cached: int | None
    #: tmpfs and shared memory; part of ``cached``.
    shmem: int | None
    #: The kernel's objects: what it can give back, and the rest.
    reclaimable: int | None
    unreclaimable: int | None
    per_cpu: int | None
    swap_total: int | None
    swap_free: int | None
    #: Of all processes.
    page_tables: int | None
    #: The same of guests, that is KVM's (Linux 6.1).
    secondary_page_tables: int | None
    kernel_stacks: int | None
    #: Free, but on the CPUs' lists and not in ``free`` (linux/counters/zoneinfo.py).
    on_lists: int | None = None

    @property
    def unused(self) -> int | None:
        """All that is free."""
        if self.free is None or self.on_lists is None:
            return None
        return self.free + self.on_lists


def parse(text: bytes) -> MemInfo:
    """The figures in the text of a meminfo file."""
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
    """The host's memory now. Raises Incompatible when /proc is not mounted, NotPermitted."""
    text = read_file(root / "proc/meminfo")
    if text is None:
        raise Incompatible(
            f"there is no {root / 'proc/meminfo'}", hint=as_root("mount -t proc proc /proc")
        )
    return replace(parse(text), on_lists=zoneinfo.free_on_lists(root))
