"""Hot-plug disks: virtio-blk devices on the hot-plug bus.

QEMU receives the open file instead of its name, because it may open none. The caller has locked the
file (linux/disk_image.py), and QEMU's copy of the descriptor keeps the lock.

Not here: which file it is (guest/lifecycle/disks.py), and what the guest does with the disk.
"""

from __future__ import annotations

import contextlib

from onecopy.errors import GuestFailed
from onecopy.vmm.argv import HOT_BUS
from onecopy.vmm.monitor import Monitor
from onecopy.vmm.pmem_hotplug import device_id


async def plug(monitor: Monitor, slot: int, file: int, form: str, name: str) -> None:
    """Plug a disk image into a free slot.

    Args:
        file: a descriptor of the image.
        form: raw or qcow2.
        name: the serial number by which the guest finds the disk.

    Raises:
        GuestFailed: QEMU refused.
    """
    node = f"{device_id(slot)}-disk"
    async with monitor.lent_copy(file) as path:
        await monitor.execute("blockdev-add", block_device(node, path, form))
    device = {"driver": "virtio-blk-pci", "id": device_id(slot), "drive": node, "serial": name}
    # If the host's disk is full the guest gets an error. Pausing it would not help, since nobody
    # would resume it.
    device |= {"werror": "report", "rerror": "report"}
    try:
        await monitor.execute("device_add", {**device, "bus": HOT_BUS, "addr": f"{slot:#x}"})
    except BaseException:
        with contextlib.suppress(GuestFailed):
            await monitor.execute("blockdev-del", {"node-name": node})
        raise


def block_device(node: str, path: str, form: str) -> dict[str, object]:
    """Describe QEMU's block device over an open image (qemu-qmp-ref, blockdev-add).

    It uses this file alone, because a compromised QEMU may have written the image's header.
    """
    # The caller has locked the file. QEMU before 8.0 would test its own locking by opening
    # /dev/null for writing, a request that nobody answers (open_notify.py).
    file = {"driver": "file", "filename": path, "locking": "off", "discard": "unmap"}
    if form == "raw":
        return {"driver": "raw", "node-name": node, "discard": "unmap", "file": file}
    return {"driver": form, "node-name": node, "discard": "unmap", "file": file, "backing": None}
