"""Disks that a running machine gets: virtio-blk behind the bridge for hot-plug.

QEMU is given the open file, and no name: it may open none. Whoever has the file open locked it
first (linux/disk_image.py), and QEMU's copy of the descriptor keeps it so. Not here: which file it
is (guest/lifecycle/disks.py), and what the guest does with it.
"""

from __future__ import annotations

import contextlib

from onecopy.errors import GuestFailed
from onecopy.vmm.argv import HOT_BUS
from onecopy.vmm.monitor import Monitor
from onecopy.vmm.pmem_hotplug import device_id


async def plug(monitor: Monitor, slot: int, file: int, form: str, name: str) -> None:
    """Plug the disk image ``file`` (``form``: raw or qcow2) into a free slot; raise GuestFailed.

    ``name`` is the serial number by which the guest finds it.
    """
    node = f"{device_id(slot)}-disk"
    async with monitor.lent_copy(file) as path:
        await monitor.execute("blockdev-add", block_device(node, path, form))
    device = {"driver": "virtio-blk-pci", "id": device_id(slot), "drive": node, "serial": name}
    # A full disk of the host is an error that the guest sees: nobody would let it go on.
    device |= {"werror": "report", "rerror": "report"}
    try:
        await monitor.execute("device_add", {**device, "bus": HOT_BUS, "addr": f"{slot:#x}"})
    except BaseException:
        with contextlib.suppress(GuestFailed):
            await monitor.execute("blockdev-del", {"node-name": node})
        raise


def block_device(node: str, path: str, form: str) -> dict[str, object]:
    """QEMU's block device over an open image (qemu-qmp-ref, blockdev-add).

    Only this one file: a guest that took its QEMU over may have written the image's head.
    """
    # Locked by us. QEMU before 8.0 tries on /dev/null whether it could, and opening that for
    # writing is a question that nobody answers (open_notify.py).
    file = {"driver": "file", "filename": path, "locking": "off", "discard": "unmap"}
    if form == "raw":
        return {"driver": "raw", "node-name": node, "discard": "unmap", "file": file}
    return {"driver": form, "node-name": node, "discard": "unmap", "file": file, "backing": None}
