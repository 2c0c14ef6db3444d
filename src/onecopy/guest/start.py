"""Starting guests from a saved system, copy-on-write: the everyday way to start a guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from onecopy.errors import AgentFailed, GuestFailed, Incompatible, InUse, OnecopyError
from onecopy.guest import machine
from onecopy.guest.folder import GuestFolder, GuestRecord
from onecopy.guest.host import Host
from onecopy.guest.machine import SystemConfig
from onecopy.store import Artifact
from onecopy.vmm.accel import Accelerator, Choice, choose
from onecopy.vmm.agent import Agent
from onecopy.vmm.argv import Hardware, Launch, Ram, command
from onecopy.vmm.launch import Vmm, launch, prepare
from onecopy.vmm.monitor import Monitor, connect

Ports = tuple[tuple[int, int], ...]
_FORWARD = re.compile(r"TCP\[HOST_FORWARD\]\s+\d+\s+\S+\s+(\d+)\s+\S+\s+(\d+)")


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


def launch_spec(host: Host, source: Template, folder: Path, publish: Ports) -> Launch:
    """How QEMU is told to start this clone."""
    return Launch(
        binary=host.qemu.binary,
        accel=source.accel.name,
        name=folder.name,
        folder=folder,
        monitor_fd="FD",
        ram=Ram.COPY_ON_WRITE,
        ram_path=source.ram,
        ram_readonly_file=host.qemu.rom,
        publish=publish,
    )


def dry_run(host: Host, source: Template, name: str, publish: Ports) -> list[str]:
    """The exact command line, but for the number of the inherited monitor socket."""
    return command(source.hardware, launch_spec(host, source, host.run / name, publish))


async def start_clone(
    host: Host, source: Template, name: str, publish: Ports = ()
) -> GuestRecord:
    """Start one clone and hand it out, once it has a name and identity of its own.

    Raises AlreadyExists if the name is taken, InUse if a port is, GuestFailed, AgentFailed.
    """
    _require_ports(publish)
    began = time.monotonic()
    with host.claim(name, [source.artifact.digest]) as (folder, lease):
        prepare(folder.path)
        spec = launch_spec(host, source, folder.path, publish)
        vmm = launch(source.hardware, spec, inherit=[lease.fd])
        async with _or_killed(vmm):
            async with connect(folder.path / "monitor.sock") as monitor:
                with source.artifact.layer("state").path.open("rb") as state:
                    await monitor.incoming(state.fileno())
                ports = await _ports(monitor, publish)
            await _become(Agent(folder.path), name, source.config.machine_id)
            record = _record(source, folder, vmm, ports, time.monotonic() - began)
            folder.hand_out(record)
            vmm.detach()
            return record


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


async def _become(agent: Agent, name: str, machine_id: bool) -> None:
    """Give the clone a name and machine-id of its own, and see that it has them.

    The kernel's random numbers were re-seeded by the vmgenid device before the guest ran on.
    """
    await agent.write_file("/proc/sys/kernel/hostname", name.encode())
    if machine_id:
        await agent.write_file("/etc/machine-id", f"{secrets.token_hex(16)}\n".encode())
    answer = await agent.call("guest-get-host-name")
    if answer["host-name"] != name:
        raise AgentFailed(f"the clone did not take its name {name}: it is {answer['host-name']}")


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
        started=time.time(),
        start_seconds=seconds,
        memory=source.config.memory,
        ram_path=str(source.ram),
        segments=source.segments,
        publish=ports,
    )


def _require_ports(publish: Ports) -> None:
    for port, _ in publish:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                raise InUse(
                    f"port {port} on 127.0.0.1 is taken",
                    users=(),
                    hint="give another port, or 0 for any free one",
                ) from None


async def _ports(monitor: Monitor, publish: Ports) -> Ports:
    """The published ports, with those that were left to the kernel."""
    if all(port for port, _ in publish):
        return publish
    text = await monitor.human("info usernet")
    return tuple(sorted((int(host), int(guest)) for host, guest in _FORWARD.findall(text)))


@dataclass(frozen=True, slots=True)
class Started:
    """What came of starting several clones."""

    guests: tuple[GuestRecord, ...]
    failures: tuple[tuple[str, OnecopyError], ...]
    """(name, why) of those that could not start."""


async def start_clones(
    host: Host,
    source: Template,
    names: Sequence[str],
    publish: Ports = (),
    *,
    keep_going: bool = False,
) -> Started:
    """Start clones concurrently.

    If one cannot start all others are stopped again and its error is raised, unless
    ``keep_going``: then they run on, and the failures are told beside them.
    """
    # More at once than there are processors only makes each of them start later.
    turn = asyncio.Semaphore(2 * (os.cpu_count() or 1))

    async def start(name: str) -> GuestRecord:
        async with turn:
            return await start_clone(host, source, name, publish)

    tasks = {name: asyncio.ensure_future(start(name)) for name in names}
    try:
        await asyncio.wait(
            tasks.values(),
            return_when=asyncio.ALL_COMPLETED if keep_going else asyncio.FIRST_EXCEPTION,
        )
    finally:
        failures = await _settle(host, tasks, keep=keep_going)
    if failures and not keep_going:
        raise failures[0][1]
    return Started(
        tuple(task.result() for task in tasks.values() if not task.exception()), tuple(failures)
    )


async def _settle(
    host: Host, tasks: dict[str, asyncio.Future[GuestRecord]], *, keep: bool
) -> list[tuple[str, OnecopyError]]:
    """End what still starts; unless ``keep``, also what runs if not all run. Returns failures."""
    for task in tasks.values():
        task.cancel()
    results = await asyncio.gather(*tasks.values(), return_exceptions=True)
    failures = []
    for name, result in zip(tasks, results, strict=True):
        if isinstance(result, OnecopyError):
            failures.append((name, result))
        elif isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result
    if not keep and any(isinstance(result, BaseException) for result in results):
        for result in results:
            if isinstance(result, GuestRecord):
                host.end(result)
    return failures
