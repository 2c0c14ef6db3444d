"""Translates an address in a guest to the host's page frame.

All data comes from the kernels and QEMU, none from onecopy's records: the guest's /proc/PID/pagemap
and /proc/iomem, QEMU's query-memory-devices, the VMM's smaps and pagemap.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.linux.counters import pagemap, smaps
from onecopy.linux.counters.smaps import Mapping
from onecopy.model import PAGE_SIZE
from onecopy.vmm.monitor import connect

#: Python for a guest: `pages(start, end)` are {address: physical address} of this process.
IN_GUEST = """\
import os, struct
def pages(start, end):
    with open("/proc/self/pagemap", "rb", 0) as file:
        data = os.pread(file.fileno(), (end - start) // 4096 * 8, start // 4096 * 8)
    found = {}
    for number, (entry,) in enumerate(struct.iter_unpack("Q", data)):
        if entry >> 63:
            found[start + number * 4096] = (entry & (1 << 55) - 1) * 4096
    return found
"""


@dataclass(frozen=True, slots=True)
class Region:
    """A segment in the guest's physical memory."""

    start: int
    size: int
    backend: str


def query(host: Runtime, guest: GuestRecord, command: str) -> Any:
    """Ask the guest's QEMU something."""

    async def ask() -> Any:
        async with connect(host.run / guest.name) as monitor:
            return await monitor.execute(command)

    return asyncio.run(ask())


@contextlib.contextmanager
def paused(host: Runtime, guests: Sequence[GuestRecord]) -> Iterator[None]:
    """Let no guest run, so that what is read of them one after another belongs together."""
    for guest in guests:
        query(host, guest, "stop")
    try:
        yield
    finally:
        for guest in guests:
            query(host, guest, "cont")


def regions(host: Runtime, guest: GuestRecord) -> dict[str, Region]:
    """Path of each segment's blob -> where the guest has it."""
    paths = {}
    for line in (Path("/proc") / str(guest.pid) / "cmdline").read_bytes().split(b"\0"):
        options = dict(o.split("=", 1) for o in line.decode().split(",") if "=" in o)
        if line.startswith(b"memory-backend-file,id=segment"):
            fd = Path("/proc") / str(guest.pid) / options["mem-path"].removeprefix("/proc/self/")
            paths[f"/objects/{options['id']}"] = str(fd.readlink())
    devices = [d["data"] for d in query(host, guest, "query-memory-devices")]
    return {
        paths[d["memdev"]]: Region(d["memaddr"], d["size"], d["memdev"])
        for d in devices
        if d["memdev"] in paths
    }


def mapping(guest: GuestRecord, path: str | Path) -> Mapping:
    """The one mapping of a file in the guest's VMM."""
    (found,) = [m for m in smaps.read(guest.pid) if m.path == str(path) and m.size >= 2 << 20]
    return found


def entries(guest: GuestRecord, path: str | Path) -> list[int]:
    """The VMM's pagemap entries of a file that it maps, by page of the file."""
    where = mapping(guest, path)
    assert where.offset == 0
    return list(pagemap.read(guest.pid, where.start, where.size // PAGE_SIZE))


def ram(guest: GuestRecord) -> list[int]:
    """The VMM's pagemap entries of a clone's RAM, by guest page frame (RAM below 2 GiB)."""
    assert guest.ram_path is not None
    return entries(guest, guest.ram_path)


def ram_bytes(guest: GuestRecord, offset: int, size: int) -> bytes:
    """What stands in a clone's RAM."""
    assert guest.ram_path is not None
    start = mapping(guest, guest.ram_path).start
    with (Path("/proc") / str(guest.pid) / "mem").open("rb", buffering=0) as memory:
        memory.seek(start + offset)
        data = memory.read(size)
    assert len(data) == size
    return data


def private(entry: int) -> bool:
    """The page is in memory and the VMM's own: for a clone's RAM, a copy made on write."""
    return pagemap.present(entry) and not pagemap.file_or_shared(entry)


def decode(output: bytes) -> Any:
    """JSON that a program in a guest printed."""
    return json.loads(output)
