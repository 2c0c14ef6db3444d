"""Making memory that a guest has unloaded what it was at first: a segment that comes back is new.

Not here: the memory of devices that are new (backing.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from onecopy.errors import NotFound
from onecopy.guest.backing import backings
from onecopy.guest.folder import Attached, Device, GuestRecord
from onecopy.guest.host import Host
from onecopy.guest.machine import Placed
from onecopy.host import memory, private
from onecopy.model import PageClass


async def renew(host: Host, record: GuestRecord, kept: Attached, placed: Sequence[Placed]) -> None:
    """Drop what the guest has written to the devices that it kept of a segment.

    What guests have in common starts again if no other one has it loaded. Raises NotPermitted.
    """
    classes = [device.page_class for device in kept.devices]
    async with backings(host, classes, None) as found:
        for device, item in zip(kept.devices, placed, strict=True):
            match device.page_class:
                case PageClass.SW | PageClass.SN:
                    os.close(found.common(item.needed))
                case PageClass.EN:
                    _empty(record.pid, device)
                case PageClass.EW:
                    _undo(record.pid, device)


def _empty(pid: int, device: Device) -> None:
    fd = memory.find(pid, device.path.removeprefix("/memfd:"), device.size)
    if fd is not None:
        memory.fill(fd, None)
        os.close(fd)


def _undo(pid: int, device: Device) -> None:
    try:
        runs = private.own_runs(pid, device.path)
    except NotFound:
        return
    with Path(device.file).open("rb", buffering=0) as content:
        private.put_back(pid, runs, content.fileno())
