"""Saves a system: a guest's RAM and device state at one moment.

`save_system` boots a guest and saves it when it is ready and idle. `save_guest` saves a running
guest, which keeps running. In both cases the RAM becomes a file that clones map privately
(snapshot.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from onecopy.errors import GuestFailed, InvalidInput
from onecopy.guest import identity
from onecopy.guest.exec import run_captured
from onecopy.guest.guest_script import said
from onecopy.guest.identity import Identity
from onecopy.guest.lifecycle import admission, launcher, snapshot, start
from onecopy.guest.lifecycle.clone_hooks import KEPT, Hooks, hooked
from onecopy.guest.lifecycle.freeze import frozen
from onecopy.guest.lifecycle.launchplan import BootSpec, LaunchPlan
from onecopy.guest.lifecycle.snapshot import Snapshot, Source
from onecopy.guest.machine import STATE_ROOM, Generator, MappedSegment, SystemConfig
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.guest.segments.hotplug import changing
from onecopy.linux import process
from onecopy.model import PageClass, Reference, format_size
from onecopy.store import Access, Artifact, NewLayer, require_disk
from onecopy.store.oci import ROLE
from onecopy.vmm.argv import Nic
from onecopy.vmm.guest_reply import decimal, shown
from onecopy.vmm.qemu_process import Vmm

#: A guest is idle when its VMM uses at most this share of a processor for this time (seconds). The
#: kernel delays work that is not urgent by one second (net/core/link_watch.c).
_RESTING = 0.02
_REST = 1.25
#: The same time with the image's own init. udev ends workers after 3 to 4 idle seconds (on_post()
#: in systemd's src/udev/udevd.c), and each clone would repeat that. The last worker handles the
#: removal of the port of onecopy's own exec.
_REST_OF_INIT = 5.0
#: Seconds after which a guest is saved even if it is not idle.
_PATIENCE, _PATIENCE_WITH_INIT = 10.0, 25.0
#: Waits until udev has handled all devices, like `udevadm settle`, for at most five minutes.
#: systemd reports a system as running while udev still loads modules for devices.
_SETTLED = "n=0; while [ -e /run/udev/queue ] && [ $n -lt 600 ]; do sleep .5; n=$((n + 1)); done"


class Saved(msgspec.Struct, frozen=True):
    """The result of a save.

    Attributes:
        artifact: The saved system.
    """

    artifact: Artifact
    memory: int
    """Bytes of RAM."""
    stored: int
    """Bytes of the RAM that take disk space; zero pages take none."""
    pause: float
    """Seconds for which the guest was paused."""
    clone_hooks: tuple[str, ...] = ()
    """The hooks that each clone runs before it is handed out, in that order."""
    generators: tuple[Generator, ...] = ()
    """Programs whose random generators have the same state in all clones."""


def plan_save(
    host: Runtime, ref: Reference, spec: BootSpec, progress: Callable[[str], None] = lambda _: None
) -> LaunchPlan:
    """Plan the boot of a guest, and check that it can be saved as ``ref``.

    Raises:
        AlreadyExists, OtherDomain: The name ``ref`` is taken.
        InvalidInput: The guest cannot be saved.
        InsufficientResources: The host has too little memory or disk space.
        OnecopyError: Any other error of `start.plan_launch`.
    """
    host.store.require_free("system", ref, Access(domain=host.store.access(spec.root.name).domain))
    plan = start.plan_launch(host, spec, progress)
    if plan.boot is None or not plan.config.agent:
        raise InvalidInput(
            f"{plan.source.ref} is a bare kernel, which cannot report when it is ready",
            hint=f"boot it with `onecopy boot {plan.source.ref}`, then `onecopy save --from GUEST`",
        )
    _require_fixed(plan.config.segments)
    need = admission.of_plan(plan)
    admission.require(need.each)
    require_disk(host.store.root, plan.config.memory + STATE_ROOM)
    # With this word the kernel zeroes freed memory, so it takes no disk space. Other guests boot
    # without it, because it makes the kernel touch all of its RAM.
    boot = replace(plan.boot, words=" init_on_free=1")
    plan = replace(plan, boot=boot, translated=need.translated)
    return plan.named(f"saving-{secrets.token_hex(4)}", ())


async def save_system(
    host: Runtime,
    ref: Reference,
    spec: BootSpec,
    progress: Callable[[str], None] = lambda _: None,
    hooks: Hooks = KEPT,
) -> Saved:
    """Boot a guest, wait until it is ready, and save it; the guest ends in any case.

    Raises:
        InvalidInput: The guest cannot have one of the hooks.
        NotReady, GuestFailed: The guest was not ready in time, or failed.
        OnecopyError: Any other error of `plan_save`.
    """
    plan = plan_save(host, ref, spec, progress)
    with host.store.workspace() as work, host.batch() as batch:
        async with launcher.running(host, plan, batch) as up:
            folder, config = up.folder.path, plan.config
            await _read_folders(folder, config.segments)
            config = await _install_hooks(folder, hooks, config, progress)
            config = await _rehearse(folder, plan.name, launcher.card_of(up.record), config)
            progress("the guest is ready; waiting until it is idle")
            await _come_to_rest(folder, up.vmm, with_init=config.command is None)
            progress("freezing the guest")
            source = Source(up.vmm.pid, config.memory, None)
            still = frozen(folder, progress, last=True)
            taken = await snapshot.take(up.folder, source, work, still, last=True)
            # Killed, because a guest that shuts down writes to its memory again.
            await up.vmm.kill()
            progress("storing the guest's memory")
            layers = _layers(host.store.held(plan.name), config, taken)
            saved = await _store(host, ref, config, layers, taken, plan.domain)
            host.drop(up.folder)
            return saved


async def save_guest(
    host: Runtime,
    ref: Reference,
    name: str,
    progress: Callable[[str], None] = lambda _: None,
    hooks: Hooks = KEPT,
) -> Saved:
    """Save a running guest as it is now; the guest keeps running.

    Raises:
        NotFound, InvalidInput, InUse, NotPermitted, OtherDomain: The guest cannot be saved.
        GuestFailed, AgentFailed: The guest or its agent failed.
        InsufficientResources: The disk has too little free space.
    """
    async with changing(host, name) as folder:
        record = folder.record()
        host.store.require_free("system", ref, Access(domain=record.domain))
        config = msgspec.structs.replace(SystemConfig.read(folder.path), qemu=host.qemu.version)
        _require_fixed(config.segments)
        _require_unfitted(record, config)
        require_disk(host.store.root, record.memory + STATE_ROOM)
        if hooks != KEPT:
            folder.require_agent()
        if config.agent:
            progress("preparing the guest")
        config = await _install_hooks(folder.path, hooks, config, progress)
        config = await _prepare(folder.path, config, card=bool(record.mac))
        with host.store.workspace() as work:
            progress("freezing the guest")
            still = _freezing(folder.path, progress, config)
            taken = await snapshot.take(folder, _source(record), work, still)
            progress("storing the guest's memory")
            layers = _layers(host.store.held(name), config, taken)
            return await _store(host, ref, config, layers, taken, record.domain)


def _source(record: GuestRecord) -> Source:
    return Source(record.pid, record.memory, Path(record.ram_path) if record.ram_path else None)


async def _install_hooks(
    folder: Path, hooks: Hooks, config: SystemConfig, progress: Callable[[str], None]
) -> SystemConfig:
    """Choose the clones' hooks, and record the generators that need them."""
    if not config.agent:
        return config
    if hooks.command is not None:
        await _write_command(folder, hooks.command)
        config = replace(config, clone_command=hooks.command or None)
    found = await hooked(folder, hooks.names, progress)
    return replace(config, clone_hooks=found.runs, generators=found.generators)


async def _write_command(folder: Path, command: str) -> None:
    """Write the shell command that clones run last into the guest."""
    argv = ["sh", "-c", "cat >/run/onecopy/on-clone"]
    done = await run_captured(folder, argv, stdin=command.encode(), timeout=30)
    if done.exit_code:
        raise GuestFailed(f"the guest refuses the clone hook: {said(done)}")


def _freezing(folder: Path, tell: Callable[[str], None], config: SystemConfig) -> snapshot.Freezing:
    """Return the context that freezes a guest's programs; a bare machine has no freezer."""
    return frozen(folder, tell) if config.agent else snapshot.NOT_FROZEN


async def _rehearse(
    folder: Path, name: str, card: Nic | None, config: SystemConfig
) -> SystemConfig:
    """Rehearse the change of identity in a guest that no user has yet."""
    machine_id = await _machine_id(folder)
    await identity.rehearse(folder, Identity(name, machine_id, card))
    room = await _cpu_room(folder)
    return replace(config, machine_id=machine_id is not None, cpu_room=room)


async def _prepare(folder: Path, config: SystemConfig, *, card: bool) -> SystemConfig:
    """Prepare a running guest for a save without changing it; a bare machine needs none."""
    if not config.agent:
        return config
    await identity.prepare(folder, card=card)
    machine_id = await _machine_id(folder) is not None
    return replace(config, machine_id=machine_id, cpu_room=await _cpu_room(folder))


def _require_fixed(segments: Sequence[MappedSegment]) -> None:
    """Raise InvalidInput for a range whose content changes between save and start."""
    for item in segments:
        if item.page_class is not PageClass.SR:
            raise InvalidInput(
                f"{item.name} is {item.page_class} and cannot be part of a saved "
                "system: its content belongs to running guests",
                hint="omit it, and attach it to running guests with `onecopy attach`",
            )


def _require_unfitted(record: GuestRecord, config: SystemConfig) -> None:
    """Raise InvalidInput if the guest has extra resources, which a saved state lacks."""
    given = [f"the disk {disk.path}" for disk in record.disks]
    if record.added:
        given.append(f"{format_size(record.added)} more memory")
    if record.cpus > config.cpus:
        given.append(f"{record.cpus - config.cpus} more vCPUs")
    if given:
        raise InvalidInput(
            f"{record.name} started with {', '.join(given)}, which a saved system cannot have",
            hint="save a guest that started without; give the same options to its clones",
        )


async def _read_folders(folder: Path, segments: Sequence[MappedSegment]) -> None:
    """Read the directories and inodes of all mounted segments in the guest.

    File systems copy them into the guest's own memory, unlike the content of files. After this they
    are in the saved RAM, so no clone reads or stores them again.
    """
    mountpoints = [item.mountpoint for item in segments if item.mountpoint]
    # No file has 0 links, so find reads all inodes and prints none. A failure only costs memory.
    await run_captured(folder, ["find", *mountpoints, "-xdev", "-links", "0"], timeout=300)


#: Without systemd, D-Bus has a machine id of its own; with systemd that file is a link.
_READ_MACHINE_ID = "[ -s /etc/machine-id ] && cd /etc || cd /var/lib/dbus && cat machine-id"


async def _machine_id(folder: Path) -> str | None:
    done = await run_captured(folder, ["sh", "-c", _READ_MACHINE_ID], timeout=30)
    return shown(done.stdout) or None


async def _cpu_room(folder: Path) -> int:
    """Return the most processors that the guest's kernel can have.

    Without a known hypervisor, as under TCG, Linux accepts no processor while it runs (since 6.18
    and in stable versions).

    Source:
        Linux, admin-guide/cputopology.rst; acpi_is_processor_usable() in
        arch/x86/kernel/acpi/boot.c.
    """
    done = await run_captured(folder, ["cat", "/sys/devices/system/cpu/possible"], timeout=30)
    last = shown(done.stdout).rpartition("-")[2]
    return decimal(last, "the last processor of the guest", most=1 << 16) + 1 if last else 0


async def _come_to_rest(folder: Path, vmm: Vmm, *, with_init: bool) -> None:
    """Wait until the guest is idle, because each clone would repeat its pending work.

    Just after boot there is much: network links, delayed work, start-up jobs and, with the image's
    own init, modules for devices. A guest that stays busy is saved after a time limit.
    """
    if with_init:
        await run_captured(folder, ["sh", "-c", _SETTLED], timeout=600)
    rest = _REST_OF_INIT if with_init else _REST
    deadline = time.monotonic() + (_PATIENCE_WITH_INIT if with_init else _PATIENCE)
    used = process.cpu_seconds(vmm.pid)
    while time.monotonic() < deadline:
        await asyncio.sleep(rest)
        before, used = used, process.cpu_seconds(vmm.pid)
        if used - before <= rest * _RESTING:
            return


def _layers(held: Sequence[Artifact], config: SystemConfig, taken: Snapshot) -> list[NewLayer]:
    """Return the layers of a saved system: its own, its kernel's and its segments'."""
    blobs = {layer.digest: layer for artifact in held for layer in artifact.layers}
    kernel = next(each.layer("kernel") for each in held if each.kind in ("kernel", "system"))
    return [
        NewLayer(taken.ram, "application/vnd.onecopy.ram.v1", {ROLE: "ram"}),
        NewLayer(taken.state, "application/vnd.onecopy.state.v1", {ROLE: "state"}),
        NewLayer.of(kernel, {ROLE: "kernel"}),
        *(NewLayer.of(blobs[item.digest], {ROLE: "segment"}) for item in config.segments),
    ]


async def _store(
    host: Runtime,
    ref: Reference,
    config: SystemConfig,
    layers: Sequence[NewLayer],
    taken: Snapshot,
    domain: str,
) -> Saved:
    stored = taken.ram.stat().st_blocks * 512
    # A cancellation that is pending here ends the save.
    await asyncio.sleep(0)
    access = Access(domain=domain)
    artifact = host.store.put("system", ref, msgspec.json.encode(config), layers, access=access)
    # The system is stored, so a later cancellation has no effect.
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    return Saved(
        artifact, config.memory, stored, taken.pause, config.clone_hooks, config.generators
    )
