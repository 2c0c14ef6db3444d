"""Starting guests from a saved system, copy-on-write: the everyday way to start a guest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import msgspec
from msgspec.structs import replace

from onecopy.errors import GuestFailed, Incompatible, NotFound
from onecopy.guest import identity, machine
from onecopy.guest.identity import new_identity
from onecopy.guest.lifecycle import device_state
from onecopy.guest.lifecycle.launch import (
    display_slots,
    handed_out,
    kill_on_error,
    open_to,
    race_exit,
    record_launch,
    require_mergeable,
    segment_names,
    started,
    with_segments,
)
from onecopy.guest.lifecycle.resources import NOTHING, ExtraResources, fit, require_possible
from onecopy.guest.machine import Placed, SystemConfig
from onecopy.guest.network import Network, can_be_closed, display_nic, new_nic, require_closed
from onecopy.guest.pagecache import preload
from onecopy.guest.ports import Ports, forward, need_rights, published, require_free
from onecopy.guest.run_directory import Batch, GuestRecord, RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.images.kernel import ensure_kernel
from onecopy.linux import process
from onecopy.linux.tap import connect_tap
from onecopy.model import Mergeable
from onecopy.store import Artifact
from onecopy.vmm import open_notify
from onecopy.vmm.accel import Accelerator, Choice, choose
from onecopy.vmm.argv import TRANSLATED, Hardware, Launch, Nic, Ram, command
from onecopy.vmm.monitor import connect
from onecopy.vmm.qemu_process import Vmm, prepare


class CloneSpec(msgspec.Struct, frozen=True):
    """What a user asks for when starting a clone: what may differ from what was saved."""

    publish: Ports = ()
    bridge: str = ""
    """Of the host, to be a port of; "" for a user-mode network."""
    ksm: Mergeable = Mergeable.RAM
    """A guest of a trust domain is closed to it all the same."""
    fitting: ExtraResources = NOTHING
    allow_host: bool = False
    """Whether its user-mode network reaches what listens on the host."""
    translated: int = TRANSLATED
    """Bytes for translated code under TCG (admission.py)."""

    @property
    def can_be_prepared(self) -> bool:
        """Whether all of it can be had of a VMM that was started before it was known."""
        special = self.bridge or self.allow_host or need_rights(self.publish)
        return self.ksm is Mergeable.RAM and not special


_PLAIN = CloneSpec()


class Template(msgspec.Struct, frozen=True):
    """A saved system that this host can start, looked up once for any number of clones."""

    artifact: Artifact
    config: SystemConfig
    accel: Accelerator
    hardware: Hardware
    """Without its segments, whose memory belongs to one guest (guest/backing.py)."""
    placed: tuple[Placed, ...]
    domain: str
    """The saved system's trust domain, and so the guests'."""

    @property
    def ram(self) -> Path:
        """The saved RAM."""
        return self.artifact.layer("ram").path


def template(host: Runtime, artifact: Artifact, accel: Choice = Choice.AUTO) -> Template:
    """Check that a saved system can be started here.

    Raises Incompatible with the reason, StoreDamaged.
    """
    config = SystemConfig.of(artifact)
    host.qemu.require_machine(config.machine)
    open_notify.require(host.qemu)
    if accel not in (Choice.AUTO, Choice(config.accel)):
        raise Incompatible(
            f"{artifact.ref} was saved under {config.accel} and cannot be started under {accel}",
            hint=f"leave --accel out, or save it again with --accel {accel}",
        )
    # KVM is tried with a Linux: the kernel of a bare machine may be none.
    kernel = artifact if config.agent else ensure_kernel(host.store)
    chosen = choose(
        Choice(config.accel),
        host.qemu.binary,
        kernel.layer("kernel").path,
        host.store.cache,
    )
    placed = machine.saved_places(artifact, config)
    return Template(
        artifact=artifact,
        config=config,
        accel=Accelerator(chosen.name, "the saved system's"),
        hardware=machine.hardware_of(config),
        placed=tuple(placed),
        domain=host.store.access(artifact.name).domain,
    )


def launch_spec(
    host: Runtime, source: Template, folder: Path, spec: CloneSpec, card: Nic | None
) -> Launch:
    """How QEMU is told to start this clone."""
    return Launch(
        binary=host.qemu.binary,
        accel=source.accel.name,
        name=folder.name,
        folder=folder,
        monitor_fd="FD",
        console_fd="FD",
        ram=Ram.COPY_ON_WRITE,
        ram_path=source.ram,
        rom=host.qemu.rom,
        traces=host.qemu.traces,
        card=card,
        publish=spec.publish,
        ksm=open_to(spec.ksm, source.domain),
        translated=spec.translated,
    )


def dry_run(host: Runtime, source: Template, name: str, spec: CloneSpec) -> list[str]:
    """The exact command line, but for the numbers of inherited sockets, and addresses."""
    _require_possible(host, source, spec)
    card = display_nic(_network(source, spec))
    launched = launch_spec(host, source, host.run / name, spec, card)
    return command(with_segments(source.hardware, display_slots(source.placed)), launched)


async def start_clone(
    host: Runtime,
    source: Template,
    name: str,
    spec: CloneSpec = _PLAIN,
    batch: Batch | None = None,
) -> GuestRecord:
    """Start one clone, until it has a name and identity of its own, as far as it can have one.

    Its VMM is one that was prepared (pool.py), if there is one. Nothing can be told to a bare
    machine: its clones are alike. It is handed out with its ``batch``; without one, at once. Raises
    AlreadyExists if the name is taken, InUse if a port is, StoreDamaged, GuestFailed, AgentFailed,
    Incompatible, and what it cannot be fitted with (resources.py).
    """
    _require_possible(host, source, spec)
    require_free(spec.publish)
    began = time.monotonic()
    require_mergeable(source.domain, spec.ksm)
    wanted = [source.artifact.name, *segment_names(source.placed)]
    host.store.require_access(wanted, name, source.domain)
    with host.starting(batch) as mine:
        async with _running(host, source, name, spec, mine) as (folder, vmm, record, connect):
            if source.config.agent:
                card = Nic(record.mac, record.address) if record.mac else None
                who = new_identity(name, card, machine_id=source.config.machine_id)
                address = await race_exit(vmm, identity.become(folder.path, who, connect))
                record = replace(record, address=address)
            folder.write(record)
            record = await race_exit(vmm, fit(host, mine, folder, record, spec.fitting))
            return handed_out(folder, vmm, record, began)


async def prepare_clone(
    host: Runtime, source: Template, name: str, batch: Batch, spec: CloneSpec = _PLAIN
) -> GuestRecord:
    """A VMM that is to become a clone some time (pool.py): the saved state is loaded, and it waits.

    Raises as `start_clone`.
    """
    async with _launched(host, source, name, spec, batch, runs=False) as (folder, vmm, record, _):
        folder.set_aside(record)
        vmm.detach()
        return record


#: The last connects its network card, where that has not been done.
_Up = tuple[RunDirectory, Vmm, GuestRecord, Callable[[], None]]


@contextlib.asynccontextmanager
async def _running(
    host: Runtime, source: Template, name: str, spec: CloneSpec, batch: Batch
) -> AsyncIterator[_Up]:
    """A clone that runs on as what was saved; on any error its VMM is ended."""
    if spec.can_be_prepared:
        suits = partial(can_be_closed, host)
        with host.taking(source.artifact.digest, name, batch, suits) as prepared:
            if prepared:
                async with _woken(*prepared, spec) as up:
                    yield up
                return
    async with _launched(host, source, name, spec, batch, runs=True) as up:
        yield up


@contextlib.asynccontextmanager
async def _woken(folder: RunDirectory, record: GuestRecord, spec: CloneSpec) -> AsyncIterator[_Up]:
    """Let a prepared VMM run."""
    try:
        argv = process.cmdline(record.pid)
        vmm = Vmm(record.pid, folder.path, argv, listener=record.listener)
    except (NotFound, ProcessLookupError) as error:
        raise GuestFailed("QEMU ended while it waited", hint="try again") from error
    async with kill_on_error(vmm):
        require_closed(record, folder.path)
        async with connect(folder.path / "monitor.sock") as monitor:
            await forward(monitor, folder.path, spec.publish)
            await monitor.execute("cont")
            ports = await published(monitor, folder.path, spec.publish)
        yield folder, vmm, replace(record, name=folder.name, publish=ports), _connected


@contextlib.asynccontextmanager
async def _launched(
    host: Runtime, source: Template, name: str, spec: CloneSpec, batch: Batch, *, runs: bool
) -> AsyncIterator[_Up]:
    """A new VMM with the saved state."""
    with (
        host.claim(name, [source.artifact.digest], batch) as (folder, lease),
        # In a bridge it is still taken for who was saved. Bare machines do not tell when no more.
        new_nic(
            host, folder.path, _network(source, spec), connected=not source.config.agent
        ) as card,
        # Not before it is leased: another command may remove it until then.
        device_state.checked(source.artifact) as devices,
    ):
        preload.begin_aside(host.store, source.artifact.layers)
        prepare(folder.path)
        launched = launch_spec(host, source, folder.path, spec, card)
        launched = replace(launched, ports_later=not runs)
        async with started(host, source.placed, source.hardware, launched, lease) as (vmm, backed):
            async with connect(folder.path / "monitor.sock") as monitor:
                await monitor.incoming(devices)
                if runs:
                    await monitor.execute("cont")
                ports = await published(monitor, folder.path, spec.publish)
            record = record_launch(
                folder,
                vmm,
                kind="clone",
                source=source.artifact,
                accel=source.accel,
                config=source.config,
                placed=source.placed,
                backed=backed,
                domain=source.domain,
                ram_path=str(source.ram),
                publish=ports,
                card=card,
                address=card.address if card else "",
                bridge=spec.bridge,
            )
            yield folder, vmm, record, _connecting(card, spec)


def _connecting(card: Nic | None, spec: CloneSpec) -> Callable[[], None]:
    """What connects a card to the bridge that it is for."""
    if not spec.bridge or card is None or not isinstance(card.tap, int):
        return _connected
    return partial(connect_tap, card.tap, spec.bridge)


def _connected() -> None:
    """It is."""


def _require_possible(host: Runtime, source: Template, spec: CloneSpec) -> None:
    require_possible(host, spec.fitting, source.config, f"{source.artifact.ref} was saved")


def _network(source: Template, spec: CloneSpec) -> Network:
    return Network(source.config.network, spec.bridge, spec.publish, spec.allow_host)
