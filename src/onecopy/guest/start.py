"""Starting guests from a saved system, copy-on-write: the everyday way to start a guest."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecopy.errors import GuestFailed, Incompatible
from onecopy.guest import identity, machine
from onecopy.guest.folder import Batch, GuestFolder, GuestRecord
from onecopy.guest.host import Host
from onecopy.guest.machine import SystemConfig
from onecopy.guest.ports import Ports, published, require_free
from onecopy.store import Artifact
from onecopy.vmm import readonly_ram
from onecopy.vmm.accel import Accelerator, Choice, choose
from onecopy.vmm.argv import Hardware, Launch, Ram, command
from onecopy.vmm.launch import Vmm, launch, prepare
from onecopy.vmm.monitor import connect


@dataclass(frozen=True, slots=True)
class Template:
    """A saved system that this host can start, looked up once for any number of clones."""

    artifact: Artifact
    config: SystemConfig
    accel: Accelerator
    hardware: Hardware
    segments: dict[str, str]
    """Path of each mapped blob -> name."""

    @property
    def ram(self) -> Path:
        """The saved RAM."""
        return self.artifact.layer("ram").path


def template(host: Host, artifact: Artifact, accel: Choice = Choice.AUTO) -> Template:
    """Check that a saved system can be started here; raise Incompatible with the reason."""
    config = SystemConfig.of(artifact)
    host.qemu.require_machine(config.machine)
    readonly_ram.require(host.qemu)
    if accel not in (Choice.AUTO, Choice(config.accel)):
        raise Incompatible(
            f"{artifact.ref} was saved under {config.accel} and cannot be started under {accel}",
            hint=f"leave --accel out, or save it again with --accel {accel}",
        )
    chosen = choose(
        Choice(config.accel),
        host.qemu.binary,
        artifact.layer("kernel").path,
        host.store.cache,
    )
    placed = machine.saved_places(artifact, config)
    return Template(
        artifact=artifact,
        config=config,
        accel=Accelerator(chosen.name, "the saved system's"),
        hardware=machine.hardware_of(config, placed),
        segments=machine.blob_names(placed),
    )


def launch_spec(
    host: Host, source: Template, folder: Path, publish: Ports, *, merge: bool = False
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
        ram_readonly_file=host.qemu.rom,
        publish=publish,
        merge=merge,
    )


def dry_run(host: Host, source: Template, name: str, publish: Ports) -> list[str]:
    """The exact command line, but for the numbers of inherited sockets."""
    return command(source.hardware, launch_spec(host, source, host.run / name, publish))


async def start_clone(
    host: Host,
    source: Template,
    name: str,
    publish: Ports = (),
    batch: Batch | None = None,
    *,
    merge: bool = False,
) -> GuestRecord:
    """Start one clone, until it has a name and identity of its own.

    It is handed out with its ``batch``; without one, at once. ``merge`` lets KSM merge the VMM's
    own memory, too. Raises AlreadyExists if the name is taken, InUse if a port is, GuestFailed,
    AgentFailed, Incompatible.
    """
    require_free(publish)
    began = time.monotonic()
    with (
        host.starting(batch) as mine,
        host.claim(name, [source.artifact.digest], mine) as (folder, lease),
    ):
        prepare(folder.path)
        spec = launch_spec(host, source, folder.path, publish, merge=merge)
        vmm = launch(source.hardware, spec, inherit=[lease.fd])
        async with _or_killed(vmm):
            async with connect(folder.path / "monitor.sock") as monitor:
                with source.artifact.layer("state").path.open("rb") as state:
                    await monitor.incoming(state.fileno())
                ports = await published(monitor, publish)
            become = identity.become(folder.path, name, machine_id=source.config.machine_id)
            await _unless_ended(vmm, become)
            record = _record(source, folder, vmm, ports, time.monotonic() - began)
            folder.write(record)
            vmm.detach()
            return record


async def _unless_ended(vmm: Vmm, work: Coroutine[Any, Any, None]) -> None:
    """Do ``work``, which does not see the VMM end: raise GuestFailed then."""
    done, ended = asyncio.ensure_future(work), asyncio.ensure_future(vmm.wait())
    try:
        await asyncio.wait({done, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise GuestFailed(f"QEMU ended while starting (exit code {ended.result()})")
        done.result()
    finally:
        done.cancel()
        ended.cancel()
        await asyncio.gather(done, ended, return_exceptions=True)


@contextlib.asynccontextmanager
async def _or_killed(vmm: Vmm) -> AsyncIterator[None]:
    try:
        yield
    except GuestFailed as error:
        await vmm.kill()
        raise vmm.explain(error) from error
    except BaseException:
        await vmm.kill()
        raise


def _record(
    source: Template, folder: GuestFolder, vmm: Vmm, ports: Ports, seconds: float
) -> GuestRecord:
    return GuestRecord(
        name=folder.name,
        kind="clone",
        source=source.artifact.ref,
        digest=source.artifact.digest,
        accel=source.accel.name,
        accel_reason=source.accel.reason,
        pid=vmm.pid,
        start_ticks=vmm.start_ticks,
        started=time.time(),
        start_seconds=seconds,
        memory=source.config.memory,
        ram_path=str(source.ram),
        segments=source.segments,
        publish=ports,
    )
