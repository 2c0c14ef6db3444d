"""Making memory that a guest has unloaded what it was at first: a segment that comes back is new.

Not here: the memory of devices that are new (guest/backing.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from onecopy.errors import NotFound
from onecopy.guest.backing import backings
from onecopy.guest.machine import Placed
from onecopy.guest.run_directory import Attached, Device, GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.linux import cow_pages, memfd
from onecopy.model import PageClass


async def renew(
    host: Runtime, record: GuestRecord, kept: Attached, placed: Sequence[Placed]
) -> None:
    """Drop what the guest has written to the devices that it kept of a segment.

    What guests have in common starts again if no other one has it loaded. Raises NotPermitted.
    """
    classes = [device.page_class for device in kept.devices]
    async with backings(host, classes, None) as found:
        for device, item in zip(kept.devices, placed, strict=True):
            match device.page_class:
                case PageClass.SW | PageClass.SN:
                    os.close(found.common(item))
                case PageClass.EN:
                    _empty(record.pid, device)
                case PageClass.EW:
                    _undo(record.pid, device)


def _empty(pid: int, device: Device) -> None:
    fd = memfd.find(pid, device.path.removeprefix("/memfd:"), device.size)
    if fd is not None:
        memfd.fill(fd, None)
        os.close(fd)


def _undo(pid: int, device: Device) -> None:
    try:
        runs = cow_pages.own_runs(pid, device.path)
    except NotFound:
        return
    with Path(device.file).open("rb", buffering=0) as content:
        cow_pages.put_back(pid, runs, content.fileno())
