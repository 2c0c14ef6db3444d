"""Saving a system: a guest's RAM, frozen at one moment, and the state of its devices.

Either a guest is booted for it, and saved once it is ready and rests; or one that runs is saved as
it is, and goes on. Both times the RAM becomes a file that clones map private (snapshot.py).
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
from onecopy.guest.lifecycle.clone_hooks import hooked
from onecopy.guest.lifecycle.freeze import frozen
from onecopy.guest.lifecycle.launchplan import BootSpec, LaunchPlan
from onecopy.guest.lifecycle.snapshot import STATE_ROOM, Snapshot, Source
from onecopy.guest.machine import Generator, MappedSegment, SystemConfig
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

#: A guest is quiet once its VMM uses no more than this share of a processor for as long (seconds):
#: longer than the kernel puts off what is not urgent (one second: net/core/link_watch.c).
_RESTING = 0.02
_REST = 1.25
#: The same with an init of the image's own: udev ends workers that were idle for 3 to 4 s (see
#: on_post() in systemd's src/udev/udevd.c), which each clone would do again. The last of them saw
#: the port of our own exec go.
_REST_OF_INIT = 5.0
#: Seconds after which a guest that does not come to rest is saved all the same.
_PATIENCE, _PATIENCE_WITH_INIT = 10.0, 25.0
#: Wait until udev has seen to all devices, as `udevadm settle` does: systemd calls a system running
#: while modules are still being loaded for its devices. Five minutes at most.
_SETTLED = "n=0; while [ -e /run/udev/queue ] && [ $n -lt 600 ]; do sleep .5; n=$((n + 1)); done"


class Saved(msgspec.Struct, frozen=True):
    """What a save came to."""

    artifact: Artifact
    memory: int
    """Bytes of RAM."""
    stored: int
    """Bytes of it that take disk: what is not zeroes."""
    pause: float
    """Seconds that the guest stood still."""
    clone_hooks: tuple[str, ...] = ()
    """What each clone runs before it is handed out, in that order."""
    generators: tuple[Generator, ...] = ()
    """Programs whose random generators clones have in common."""


def plan_save(
    host: Runtime, ref: Reference, spec: BootSpec, progress: Callable[[str], None] = lambda _: None
) -> LaunchPlan:
    """Plan the boot of a guest that is to be saved as ``ref``, and check that it can be.

    Raises what planning a boot raises (start.py), InvalidInput, AlreadyExists, OtherDomain,
    InsufficientResources.
    """
    host.store.require_free("system", ref, Access(domain=host.store.access(spec.root.name).domain))
    plan = start.plan_launch(host, spec, progress)
    if plan.boot is None or not plan.config.agent:
        raise InvalidInput(
            f"{plan.source.ref} is a kernel by itself, of which nobody can tell when it is ready",
            hint=f"`onecopy boot {plan.source.ref}`, and `onecopy save --from` that guest",
        )
    _require_fixed(plan.config.segments)
    need = admission.of_plan(plan)
    admission.require(need.each)
    require_disk(host.store.root, plan.config.memory + STATE_ROOM)
    # Freed memory is zeroes, which need not be stored. Not for guests that stay: it makes a kernel
    # touch all its RAM while it boots.
    boot = replace(plan.boot, words=" init_on_free=1")
    plan = replace(plan, boot=boot, translated=need.translated)
    return plan.named(f"saving-{secrets.token_hex(4)}", ())


async def save_system(
    host: Runtime,
    ref: Reference,
    spec: BootSpec,
    progress: Callable[[str], None] = lambda _: None,
    *,
    on_clone: str | None = None,
    clone_hooks: Sequence[str] | None = None,
) -> Saved:
    """Boot ``spec``, wait for its sign of readiness, and store it as saved system ``ref``.

    Each clone runs ``clone_hooks`` (clone_hooks.py) and then ``on_clone``, a shell command, before
    it is handed out, and must succeed in them. Raises what plan_save raises, InvalidInput for a
    hook that the guest cannot have, GuestFailed, NotReady, and InsufficientResources for disk.
    Nothing of the guest or of its files is left, whatever happens.
    """
    plan = plan_save(host, ref, spec, progress)
    with host.store.workspace() as work, host.batch() as batch:
        async with launcher.running(host, plan, batch) as up:
            folder, config = up.folder.path, plan.config
            await _read_folders(folder, config.segments)
            config = await _told(folder, on_clone, config)
            config = await _install_hooks(folder, clone_hooks, config, progress)
            config = await _rehearse(folder, plan.name, launcher.card_of(up.record), config)
            progress("ready; waiting until it is quiet")
            await _come_to_rest(folder, up.vmm, with_init=config.command is None)
            progress("freezing it")
            source = Source(up.vmm.pid, config.memory, None)
            still = frozen(folder, progress, last=True)
            taken = await snapshot.take(up.folder, source, work, still, last=True)
            # Not asked to end: it would write to its memory again.
            await up.vmm.kill()
            progress("storing its memory")
            layers = _layers(host.store.held(plan.name), config, taken)
            saved = await _stored(host, ref, config, layers, taken, plan.domain)
            host.drop(up.folder)
            return saved


async def save_guest(
    host: Runtime,
    ref: Reference,
    name: str,
    progress: Callable[[str], None] = lambda _: None,
    *,
    on_clone: str | None = None,
    clone_hooks: Sequence[str] | None = None,
) -> Saved:
    """Store a running guest as saved system ``ref``, as it is now; it goes on.

    ``on_clone`` and ``clone_hooks`` are as for `save_system`; None leaves what the guest has from
    its own saved system.
    Raises NotFound, InvalidInput (it has what a saved system cannot have), InUse (a program runs in
    it by exec), GuestFailed, AgentFailed, InsufficientResources, NotPermitted, OtherDomain.
    """
    async with changing(host, name) as folder:
        record = folder.record()
        host.store.require_free("system", ref, Access(domain=record.domain))
        config = msgspec.structs.replace(SystemConfig.read(folder.path), qemu=host.qemu.version)
        _require_fixed(config.segments)
        _require_unfitted(record, config)
        require_disk(host.store.root, record.memory + STATE_ROOM)
        if on_clone is not None or clone_hooks is not None:
            folder.require_agent()
        if config.agent:
            progress("letting it get ready")
        config = await _told(folder.path, on_clone, config)
        config = await _install_hooks(folder.path, clone_hooks, config, progress)
        config = await _prepared(folder.path, config, card=bool(record.mac))
        with host.store.workspace() as work:
            progress("freezing it")
            still = _frozen(folder.path, progress, config)
            taken = await snapshot.take(folder, _source(record), work, still)
            progress("storing its memory")
            layers = _layers(host.store.held(name), config, taken)
            return await _stored(host, ref, config, layers, taken, record.domain)


def _source(record: GuestRecord) -> Source:
    return Source(record.pid, record.memory, Path(record.ram_path) if record.ram_path else None)


async def _told(folder: Path, on_clone: str | None, config: SystemConfig) -> SystemConfig:
    """Give the guest the user's command that its clones are to run."""
    if on_clone is None:
        return config
    argv = ["sh", "-c", "cat >/run/onecopy/on-clone"]
    done = await run_captured(folder, argv, stdin=on_clone.encode(), timeout=30)
    if done.exit_code:
        raise GuestFailed(f"the guest does not take what its clones are to run: {said(done)}")
    return replace(config, on_clone=on_clone or None)


async def _install_hooks(
    folder: Path,
    clone_hooks: Sequence[str] | None,
    config: SystemConfig,
    progress: Callable[[str], None],
) -> SystemConfig:
    """Choose the hooks of its clones, and note why they should have some."""
    if not config.agent:
        return config
    found = await hooked(folder, clone_hooks, progress)
    return replace(config, clone_hooks=found.runs, generators=found.generators)


def _frozen(folder: Path, tell: Callable[[str], None], config: SystemConfig) -> snapshot.Freezing:
    """Have a guest's programs frozen; those of a bare machine cannot be."""
    return frozen(folder, tell) if config.agent else snapshot.NOT_FROZEN


async def _rehearse(
    folder: Path, name: str, card: Nic | None, config: SystemConfig
) -> SystemConfig:
    """Let a guest of which nobody knows yet get ready to become another one."""
    machine_id = await _machine_id(folder)
    await identity.rehearse(folder, Identity(name, machine_id, card))
    room = await _cpu_room(folder)
    return replace(config, machine_id=machine_id is not None, cpu_room=room)


async def _prepared(folder: Path, config: SystemConfig, *, card: bool) -> SystemConfig:
    """Let a guest get ready that is not to change, which a bare machine cannot."""
    if not config.agent:
        return config
    await identity.prepare(folder, card=card)
    machine_id = await _machine_id(folder) is not None
    return replace(config, machine_id=machine_id, cpu_room=await _cpu_room(folder))


def _require_fixed(segments: Sequence[MappedSegment]) -> None:
    """Raise InvalidInput for a range that would not be the same when the system is started."""
    for item in segments:
        if item.page_class is not PageClass.SR:
            raise InvalidInput(
                f"{item.name} is {item.page_class} and cannot be part of a saved "
                "system: its content belongs to running guests",
                hint="leave it out, and `onecopy attach` it to the guests once they run",
            )


def _require_unfitted(record: GuestRecord, config: SystemConfig) -> None:
    """Raise InvalidInput for what a guest was given at its start: it is in no saved state."""
    given = [f"the disk {disk.path}" for disk in record.disks]
    if record.added:
        given.append(f"{format_size(record.added)} more memory")
    if record.cpus > config.cpus:
        given.append(f"{record.cpus - config.cpus} more processors")
    if given:
        raise InvalidInput(
            f"{record.name} was given {', '.join(given)} at its start, which a saved system is "
            "without",
            hint="start a guest without and save that; clones of it are given the like again",
        )


async def _read_folders(folder: Path, segments: Sequence[MappedSegment]) -> None:
    """Let the guest read the folders and inodes of its segments.

    File systems read these, unlike files, by block and into memory of the guest's own: now they are
    in the saved system, and no clone reads or keeps any of them again.
    """
    mountpoints = [item.mountpoint for item in segments if item.mountpoint]
    # No file has 0 links: all are looked at, none is printed. Clones also do without, at a cost.
    await run_captured(folder, ["find", *mountpoints, "-xdev", "-links", "0"], timeout=300)


#: D-Bus by itself has one of its own; with systemd that is a link.
_READ_MACHINE_ID = "[ -s /etc/machine-id ] && cd /etc || cd /var/lib/dbus && cat machine-id"


async def _machine_id(folder: Path) -> str | None:
    done = await run_captured(folder, ["sh", "-c", _READ_MACHINE_ID], timeout=30)
    return shown(done.stdout) or None


async def _cpu_room(folder: Path) -> int:
    """How many processors the guest's kernel can have (Linux admin-guide/cputopology.rst).

    Where it knows no hypervisor, as under TCG, Linux takes none while it runs (since 6.18, and in
    stable versions: acpi_is_processor_usable() in arch/x86/kernel/acpi/boot.c).
    """
    done = await run_captured(folder, ["cat", "/sys/devices/system/cpu/possible"], timeout=30)
    last = shown(done.stdout).rpartition("-")[2]
    return decimal(last, "the last processor of the guest", most=1 << 16) + 1 if last else 0


async def _come_to_rest(folder: Path, vmm: Vmm, *, with_init: bool) -> None:
    """Wait until the guest rests: what it was still about to do each clone would do again.

    Right after boot that is much: links coming up, delayed work, start-up jobs, with an init of the
    image's own also modules for its devices. A guest that never rests is taken as it is.
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
    """The layers of a saved system: its own, and those of what the guest runs from."""
    blobs = {layer.digest: layer for artifact in held for layer in artifact.layers}
    kernel = next(each.layer("kernel") for each in held if each.kind in ("kernel", "system"))
    return [
        NewLayer(taken.ram, "application/vnd.onecopy.ram.v1", {ROLE: "ram"}),
        NewLayer(taken.state, "application/vnd.onecopy.state.v1", {ROLE: "state"}),
        NewLayer.of(kernel, {ROLE: "kernel"}),
        *(NewLayer.of(blobs[item.digest], {ROLE: "segment"}) for item in config.segments),
    ]


async def _stored(
    host: Runtime,
    ref: Reference,
    config: SystemConfig,
    layers: Sequence[NewLayer],
    taken: Snapshot,
    domain: str,
) -> Saved:
    stored = taken.ram.stat().st_blocks * 512
    # An interrupt comes as a cancellation: heeded up to here,
    await asyncio.sleep(0)
    access = Access(domain=domain)
    artifact = host.store.put("system", ref, msgspec.json.encode(config), layers, access=access)
    # and too late after it.
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    return Saved(
        artifact, config.memory, stored, taken.pause, config.clone_hooks, config.generators
    )
