"""Saving a system: boot a guest, wait until it is ready, freeze it, keep its RAM and state.

RAM is a file of the store's own from the start (mapped shared), so nothing is copied: QEMU writes
only the devices' state, some hundred KiB (capability ``x-ignore-shared``, QEMU
docs/system/vm-templating.rst).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from onecopy.build.kernel import KernelConfig
from onecopy.guest.boot import ColdSpec, Prepared, booted, launch_spec, prepare_cold
from onecopy.guest.exec import run_captured
from onecopy.guest.host import Host
from onecopy.guest.machine import SystemConfig
from onecopy.model import MIB, Reference
from onecopy.run import run
from onecopy.store import Artifact, NewLayer, require_disk
from onecopy.store.disk import file_errors
from onecopy.vmm.argv import Ram, command
from onecopy.vmm.launch import Vmm
from onecopy.vmm.monitor import connect

_ROLE = "org.onecopy.role"
#: Bytes of device state and records that a saved system may need besides its RAM.
_STATE_ROOM = 16 * MIB


async def save_system(
    host: Host, ref: Reference, spec: ColdSpec, progress: Callable[[str], None] = lambda _: None
) -> Artifact:
    """Boot ``spec``, wait for its sign of readiness, and store it as saved system ``ref``.

    Raises what prepare_cold raises, GuestFailed, NotReady, and NotEnough for disk. Nothing of the
    guest or of its files is left, whatever happens.
    """
    prepared = prepare_cold(host, spec, progress)
    require_disk(host.store.root, prepared.hardware.memory + _STATE_ROOM)
    name = f"saving-{secrets.token_hex(4)}"
    with host.store.workspace() as work:
        ram = work / "ram"
        _reserve(ram, prepared.hardware.memory)
        with host.claim(name, prepared.digests) as (folder, lease):
            launched = replace(
                launch_spec(host, prepared, folder.path, name), ram=Ram.SAVING, ram_path=ram
            )
            progress(f"booting under {prepared.accel.name} ({prepared.accel.reason})")
            async with booted(prepared, launched, [lease.fd]) as vmm:
                machine_id = await _has_machine_id(folder.path)
                progress("ready; freezing it")
                await _freeze(vmm, work / "state")
            folder.remove()
            progress("storing its memory")
            # Pages of zeroes need no disk and no page cache.
            run(["fallocate", "--dig-holes", ram])
            # An interrupt comes as a cancellation: heeded up to here,
            await asyncio.sleep(0)
            artifact = _put(host, ref, prepared, work, machine_id)
            # and too late after it.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
            return artifact


def _reserve(path: Path, size: int) -> None:
    """A file whose blocks exist: a full disk must be told now, not by QEMU, or SIGBUS, later."""
    with file_errors(path.parent), path.open("xb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


async def _has_machine_id(folder: Path) -> bool:
    done = await run_captured(folder, ["test", "-s", "/etc/machine-id"], timeout=30)
    return done.exit_code == 0


async def _freeze(vmm: Vmm, state: Path) -> None:
    async with connect(vmm.folder / "monitor.sock") as monitor:
        await monitor.execute("stop")
        _reserve(state, _STATE_ROOM)
        with state.open("r+b") as file:
            await monitor.outgoing(file.fileno())
            # The descriptor is QEMU's too, and so is its position.
            os.ftruncate(file.fileno(), os.lseek(file.fileno(), 0, os.SEEK_CUR))
        # Not "quit": closing its devices QEMU would still write to the guest's memory.
        await vmm.kill()


def _put(host: Host, ref: Reference, prepared: Prepared, work: Path, machine_id: bool) -> Artifact:
    hardware = prepared.hardware
    config = SystemConfig(
        machine=hardware.machine,
        cpu=hardware.cpu,
        cpus=hardware.cpus,
        memory=hardware.memory,
        network=hardware.network,
        accel=prepared.accel.name,
        qemu=host.qemu.version,
        kernel=KernelConfig.of(prepared.kernel).release,
        root=prepared.root.ref,
        command=prepared.command,
        machine_id=machine_id,
        segments=tuple(item.segment for item in prepared.placed),
    )
    kernel = prepared.kernel.layer("kernel")
    held = [item.layer for item in prepared.placed]
    layers = [
        NewLayer(work / "ram", "application/vnd.onecopy.ram.v1", {_ROLE: "ram"}),
        NewLayer(work / "state", "application/vnd.onecopy.state.v1", {_ROLE: "state"}),
        NewLayer(None, kernel.media_type, {_ROLE: "kernel"}, kernel.digest, kernel.size),
        *(
            NewLayer(None, layer.media_type, {_ROLE: "segment"}, layer.digest, layer.size)
            for layer in held
        ),
    ]
    return host.store.put("system", ref, msgspec.json.encode(config), layers)


def dry_run(host: Host, prepared: Prepared) -> list[str]:
    """QEMU's command line, but for names made when it runs."""
    spec = launch_spec(host, prepared, host.run / "saving", "saving")
    ram = host.store.root / "tmp/ram"
    return command(prepared.hardware, replace(spec, ram=Ram.SAVING, ram_path=ram))
