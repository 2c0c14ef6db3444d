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
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from onecopy.build.kernel import KernelConfig
from onecopy.guest import identity
from onecopy.guest.boot import ColdSpec, Prepared, booted, launch_spec, prepare_cold
from onecopy.guest.exec import run_captured
from onecopy.guest.host import Host
from onecopy.guest.machine import Placed, SystemConfig
from onecopy.host import process
from onecopy.model import MIB, Reference
from onecopy.run import run
from onecopy.store import Artifact, NewLayer, require_disk
from onecopy.store.disk import file_errors
from onecopy.vmm.argv import Ram, command
from onecopy.vmm.launch import Vmm
from onecopy.vmm.monitor import connect

_ROLE = "org.onecopy.role"
#: A guest is quiet once its VMM uses no more than this share of a processor for as long (seconds):
#: longer than the kernel puts off what is not urgent (one second: net/core/link_watch.c).
_RESTING = 0.02
_REST = 1.25
#: Seconds after which a guest that does not come to rest is saved all the same.
_PATIENCE = 10.0
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
        with (
            host.batch() as batch,
            host.claim(name, prepared.digests, batch) as (folder, lease),
        ):
            launched = replace(
                launch_spec(host, prepared, folder.path, name), ram=Ram.SAVING, ram_path=ram
            )
            progress(f"booting under {prepared.accel.name} ({prepared.accel.reason})")
            async with booted(prepared, launched, [lease.fd]) as vmm:
                await _read_folders(folder.path, prepared.placed)
                machine_id = await _machine_id(folder.path)
                await identity.rehearse(folder.path, name, machine_id)
                progress("ready; waiting until it is quiet")
                await _quiet(vmm)
                progress("freezing it")
                await _freeze(vmm, work / "state")
            folder.remove()
            progress("storing its memory")
            # It was the VMM's while that ran.
            os.chown(ram, os.geteuid(), os.getegid())
            # Pages of zeroes need no disk and no page cache.
            run(["fallocate", "--dig-holes", ram])
            # An interrupt comes as a cancellation: heeded up to here,
            await asyncio.sleep(0)
            artifact = _put(host, ref, prepared, work, machine_id is not None)
            # and too late after it.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
            return artifact


def _reserve(path: Path, size: int) -> None:
    """A file whose blocks exist: a full disk must be told now, not by QEMU, or SIGBUS, later."""
    with file_errors(path.parent), path.open("xb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


async def _read_folders(folder: Path, placed: Sequence[Placed]) -> None:
    """Let the guest read the folders and inodes of its segments.

    File systems read these, unlike files, by block and into memory of the guest's own: now they are
    in the saved system, and no clone reads or keeps any of them again.
    """
    mountpoints = [item.segment.mountpoint for item in placed]
    # No file has 0 links: all are looked at, none is printed. Clones also do without, at a cost.
    await run_captured(folder, ["find", *mountpoints, "-xdev", "-links", "0"], timeout=300)


async def _machine_id(folder: Path) -> str | None:
    done = await run_captured(folder, ["cat", "/etc/machine-id"], timeout=30)
    return done.stdout.decode().strip() or None


async def _quiet(vmm: Vmm) -> None:
    """Wait until the guest rests: what it was still about to do each clone would do again.

    Right after boot that is much: links coming up, delayed work, start-up jobs. A guest that never
    rests is taken as it is after ``_PATIENCE``.
    """
    deadline = time.monotonic() + _PATIENCE
    used = process.cpu_seconds(vmm.pid)
    while time.monotonic() < deadline:
        await asyncio.sleep(_REST)
        before, used = used, process.cpu_seconds(vmm.pid)
        if used - before <= _REST * _RESTING:
            return


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
