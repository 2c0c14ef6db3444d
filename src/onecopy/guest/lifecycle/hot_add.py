"""Gives a starting guest its extra resources: memory, vCPUs, disks and segments.

QEMU hot-plugs them when the guest runs, before the guest is handed out. The start fails if the
guest does not confirm them (images/files/fit). Not here: what a guest may request (resources.py),
the devices (vmm/ram_cpu_hotplug.py, vmm/disk_hotplug.py), the files of disks (disks.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from onecopy.errors import GuestFailed
from onecopy.guest import guest_script
from onecopy.guest.lifecycle.disks import OpenDisk, opened
from onecopy.guest.lifecycle.resources import NOTHING, ExtraResources
from onecopy.guest.run_directory import Batch, GuestDisk, GuestRecord, RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.guest.segments.attach import attach
from onecopy.linux import disk_image
from onecopy.model import MIB
from onecopy.vmm import disk_hotplug, log_room, pmem_hotplug, ram_cpu_hotplug, vmm_limits
from onecopy.vmm.monitor import Monitor, connect

#: Seconds for the guest to use its resources, and the least bytes of memory a second besides: a
#: saved kernel clears new memory, slowly under TCG.
_PATIENCE, _PACE = 60.0, 16 * MIB
#: Id of an error of the guest's script -> the hint.
_HINTS = {
    "no-cpu": "save the system again with more --cpus",
    "no-memory": "save the system again with more --memory",
    "no-mount": "a disk is mounted if it has an ext4 (mkfs.ext4); else leave :/MOUNTPOINT out",
    "mount-point-in-use": "choose another mount point",
}


async def fit(
    host: Runtime, batch: Batch, folder: RunDirectory, record: GuestRecord, wanted: ExtraResources
) -> GuestRecord:
    """Give a starting guest its extra resources; return its new record.

    After an error the caller must end the VMM.

    Raises:
        NoSlot: The guest has no slot for another device.
        GuestFailed, AgentFailed: The guest could not use a resource.
        OnecopyError: Any error of `disks.opened` and `attach`.
    """
    if wanted == NOTHING:
        return record
    with contextlib.ExitStack() as files:
        disks = [files.enter_context(opened(host, record.name, each)) for each in wanted.disks]
        words: list[str] = []
        async with connect(folder.path) as monitor:
            words += await _grow(monitor, record, wanted)
            if disks:
                with host.locked():
                    _let_write(folder.path, record.pid, disks)
            plugged = await _plug(monitor, record.name, disks)
        for each in plugged:
            words += ["disk", each.name, each.address, each.mountpoint or "-"]
        if words:
            more = (wanted.memory or record.memory) - record.memory
            await _confirm(folder, words, timeout=_PATIENCE + more / _PACE)
        memory, cpus = wanted.memory or record.memory, wanted.cpus or record.cpus
        record = msgspec.structs.replace(
            record, memory=memory, added=memory - record.memory, cpus=cpus, disks=plugged
        )
        if not wanted.segments:
            return record
        # `attach` reads the guest's record and changes it.
        folder.write(record)
        for ref, mountpoint in wanted.segments:
            await attach(host.seeing(batch), record.name, ref, mountpoint)
        return folder.record()


async def _grow(monitor: Monitor, record: GuestRecord, wanted: ExtraResources) -> list[str]:
    """Plug in memory and processors; return the words about them for the guest's script."""
    words: list[str] = []
    more = (wanted.memory or record.memory) - record.memory
    if more:
        vmm_limits.let_map(record.pid, more, private=True)
        address = await ram_cpu_hotplug.add_memory(monitor, more)
        words += ["memory", str(address), str(more)]
    if wanted.cpus and wanted.cpus > record.cpus:
        await ram_cpu_hotplug.add_cpus(monitor, wanted.cpus - record.cpus)
        words += ["cpus", str(wanted.cpus)]
    return words


async def _plug(monitor: Monitor, guest: str, disks: Sequence[OpenDisk]) -> tuple[GuestDisk, ...]:
    slots = pmem_hotplug.choose(await pmem_hotplug.used_slots(monitor), len(disks), guest)
    plugged = []
    for number, (slot, item) in enumerate(zip(slots, disks, strict=True)):
        name = f"disk{number}"
        await disk_hotplug.plug(monitor, slot, item.fd, item.form, name)
        plugged.append(
            GuestDisk(
                name=name,
                path=str(item.path),
                format=item.form,
                owned=item.spec.file is None,
                mountpoint=item.spec.mountpoint,
                address=f"01:{slot:02x}",
                created=item.made,
            )
        )
    return tuple(plugged)


def _let_write(folder: Path, pid: int, disks: Sequence[OpenDisk]) -> None:
    """Raise QEMU's limit on file sizes to the largest disk; the caller holds the host's lock."""
    log_room.make_room(
        folder, pid, max(disk_image.largest_size(each.fd, each.form) for each in disks)
    )


async def _confirm(folder: RunDirectory, words: Sequence[str], *, timeout: float) -> None:
    done = await guest_script.fit(folder.path, *words, timeout=timeout)
    if done.exit_code:
        reason = done.stderr.decode(errors="replace").partition(":")[0]
        raise GuestFailed(
            f"{folder.name} cannot use the added resources: {guest_script.said(done)}",
            hint=_HINTS.get(reason, ""),
        )
