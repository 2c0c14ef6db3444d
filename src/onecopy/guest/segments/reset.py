"""Resets the memory of an unloaded segment before a guest loads it again on the same devices.

Not here: the memory of new devices (guest/backing.py).
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
    """Discard what the guest wrote to the kept devices of a segment.

    Memory that guests share is reset only if no other guest has it loaded.

    Args:
        host: The runtime of the guest.
        record: The guest's record.
        kept: The segment in state ``kept``.
        placed: The segment's ranges, in the order of its devices.

    Raises:
        NotPermitted: This user may not access the VMM's memory.
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
        cow_pages.revert(pid, runs, content.fileno())
