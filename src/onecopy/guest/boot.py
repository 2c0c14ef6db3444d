"""Booting a cold guest: as a guest of its own, or as the one that is about to be saved."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onecopy.build.bootfiles import TOOLS_MOUNTPOINT, Boot, write_initrd
from onecopy.build.kernel import KernelConfig, ensure_kernel
from onecopy.build.tools import ensure_tools
from onecopy.errors import AgentFailed, GuestFailed, NotEnough, NotReady
from onecopy.guest import machine
from onecopy.guest.exec import Completed, run_captured
from onecopy.guest.folder import Batch, GuestFolder, GuestRecord
from onecopy.guest.host import Host
from onecopy.guest.ports import Ports, published, require_free
from onecopy.host import meminfo
from onecopy.model import MIB, Reference, align_up
from onecopy.store import Artifact
from onecopy.vmm.accel import Accelerator, Choice, choose
from onecopy.vmm.agent import Agent
from onecopy.vmm.argv import Hardware, Kernel, Launch, Ram, command
from onecopy.vmm.cpu import DEFAULT, qemu_cpu
from onecopy.vmm.launch import Vmm, launch, prepare
from onecopy.vmm.monitor import connect

MINIMUM_MEMORY = 96 * MIB
DEFAULT_MEMORY = 256 * MIB


@dataclass(frozen=True, slots=True)
class ColdSpec:
    """What a user asks for when booting a guest."""

    root: Reference
    segments: tuple[tuple[Reference, str], ...] = ()
    """(segment, mount point) pairs."""
    memory: int = DEFAULT_MEMORY
    """Bytes."""
    cpus: int = 1
    cpu: str = DEFAULT
    """CPU model (vmm/cpu.py)."""
    command: str | None = None
    """Run with a minimal init; None: the image's own init, or none if it has none."""
    ready: str | None = None
    """A shell command that exits 0 in the guest once it is ready."""
    timeout: float = 300
    """Seconds that booting and getting ready may take."""
    network: bool = True
    publish: tuple[tuple[int, int], ...] = ()
    merge: bool = False
    """KSM may merge the VMM's own memory, too."""
    accel: Choice = Choice.AUTO
    kernel: Path | None = None
    modules: Path | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything a cold guest needs, in the store; nothing runs yet."""

    spec: ColdSpec
    root: Artifact
    artifacts: tuple[Artifact, ...]
    placed: tuple[machine.Placed, ...]
    kernel: Artifact
    tools: Artifact
    accel: Accelerator
    hardware: Hardware
    command: str | None = field(default=None)

    @property
    def digests(self) -> list[str]:
        """Manifests to hold while the guest runs."""
        return [artifact.digest for artifact in self.artifacts]


def prepare_cold(
    host: Host, spec: ColdSpec, progress: Callable[[str], None] = lambda _: None
) -> Prepared:
    """Resolve names, fetch kernel and tools if the store lacks them, choose the accelerator.

    Raises NotFound, InvalidInput, NotEnough, Incompatible, and what building raises.
    """
    root = host.store.resolve(spec.root, "segment")
    extra = [(host.store.resolve(ref, "segment"), where) for ref, where in spec.segments]
    _require_memory(spec.memory)
    qemu = host.qemu
    kernel = ensure_kernel(host.store, kernel=spec.kernel, modules=spec.modules, progress=progress)
    tools = ensure_tools(host.store, progress)
    accel = choose(spec.accel, qemu.binary, kernel.layer("kernel").path, host.store.cache)
    placed = machine.place(root, tools, kernel, extra)
    hardware = Hardware(
        machine=qemu.machine,
        cpu=qemu_cpu(spec.cpu, accel.name),
        cpus=spec.cpus,
        memory=align_up(spec.memory),
        network=spec.network,
        segments=machine.slots(placed),
    )
    return Prepared(
        spec=spec,
        root=root,
        artifacts=(root, tools, kernel, *(artifact for artifact, _ in extra)),
        placed=tuple(placed),
        kernel=kernel,
        tools=tools,
        accel=accel,
        hardware=hardware,
        command=_command(spec, root),
    )


def _command(spec: ColdSpec, root: Artifact) -> str | None:
    """None for an image with an init of its own; an image without one just stays up."""
    if spec.command is not None or has_init(root):
        return spec.command
    return ""


def has_init(root: Artifact) -> bool:
    """Whether the image brings an init (build/segment.py looked)."""
    import msgspec

    return bool(msgspec.json.decode(root.config).get("init"))


def _require_memory(memory: int) -> None:
    if memory < MINIMUM_MEMORY:
        raise NotEnough(
            "memory for a guest",
            needed=MINIMUM_MEMORY,
            available=memory,
            hint=f"give at least --memory {MINIMUM_MEMORY // MIB}M",
        )
    available = meminfo.read().available
    if available is not None and available < memory:
        raise NotEnough(
            "memory", needed=memory, available=available, hint="stop guests, or give less --memory"
        )


def launch_spec(host: Host, prepared: Prepared, folder: Path, name: str) -> Launch:
    """How QEMU is told to boot this guest."""
    return Launch(
        binary=host.qemu.binary,
        accel=prepared.accel.name,
        name=name,
        folder=folder,
        monitor_fd="FD",
        console_fd="FD",
        ram=Ram.ANONYMOUS,
        kernel=Kernel(prepared.kernel.layer("kernel").path, folder / "initrd"),
        publish=prepared.spec.publish,
        merge=prepared.spec.merge,
    )


def dry_run(host: Host, prepared: Prepared, name: str) -> list[str]:
    """The exact command line, but for the numbers of inherited sockets."""
    folder = host.run / name
    return command(prepared.hardware, launch_spec(host, prepared, folder, name))


@contextlib.asynccontextmanager
async def booted(prepared: Prepared, spec: Launch, inherit: Sequence[int]) -> AsyncIterator[Vmm]:
    """Boot, wait until the guest is ready; on any error the VMM is ended."""
    write_initrd(
        spec.folder / "initrd",
        Boot(
            hostname=spec.name,
            mounts=machine.mounts(prepared.placed),
            modules=KernelConfig.of(prepared.kernel).modules,
            command=prepared.command,
        ),
        prepared.kernel.layer("boot-modules").path,
        prepared.tools.layer("busybox").path,
    )
    prepare(spec.folder)
    vmm = launch(prepared.hardware, spec, inherit=inherit)
    try:
        await _until_ready(vmm, prepared.spec)
        (spec.folder / "initrd").unlink()
        yield vmm
    except GuestFailed as error:
        await vmm.kill()
        raise vmm.explain(error) from error
    except BaseException:
        await vmm.kill()
        raise


async def _until_ready(vmm: Vmm, spec: ColdSpec) -> None:
    """Wait for the agent, then for the sign of readiness; raise GuestFailed or NotReady."""
    ended = asyncio.ensure_future(vmm.wait())
    ready = asyncio.ensure_future(_ready(vmm.folder, spec))
    try:
        await asyncio.wait({ended, ready}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            ready.result()
        else:
            raise GuestFailed(f"the guest ended while starting (QEMU's exit code {ended.result()})")
    finally:
        for task in (ended, ready):
            task.cancel()
        await asyncio.gather(ended, ready, return_exceptions=True)


async def _ready(folder: Path, spec: ColdSpec) -> None:
    deadline = time.monotonic() + spec.timeout
    try:
        await Agent(folder).call("guest-ping", timeout=spec.timeout)
    except AgentFailed:
        raise NotReady(
            f"the guest did not come up within {spec.timeout:g} s",
            hint="give it more time with --timeout, or more --memory",
        ) from None
    script = spec.ready or _DEFAULT_READY
    left = max(deadline - time.monotonic(), 1)
    # The loop runs in the guest: one program, not one each try.
    loop = f"until out=$({script}) 2>&1; do sleep 0.2; done"
    done: Completed = await run_captured(folder, ["sh", "-c", loop], timeout=left)
    if done.exit_code:
        last = await run_captured(folder, ["sh", "-c", script], timeout=10)
        raise NotReady(
            f"not ready after {spec.timeout:g} s; `{script}` last ended with exit code "
            f"{last.exit_code}: {(last.stdout + last.stderr).decode(errors='replace')[-500:]}",
            hint="correct --ready, or give it more time with --timeout",
        )


#: systemd is ready when its start-up jobs are done, failed ones included; any other init when it
#: has taken over from our second stage; a command of the user's when it has been started.
_DEFAULT_READY = f"""
    case $(readlink /proc/1/exe) in
        */systemd) case $(systemctl is-system-running 2>/dev/null) in
            running|degraded) ;;
            *) false ;;
        esac ;;
        {TOOLS_MOUNTPOINT}/*) [ -e /run/onecopy/run ] ;;
    esac
"""


async def run_cold(
    host: Host, prepared: Prepared, name: str, batch: Batch | None = None
) -> GuestRecord:
    """Boot a guest. It is handed out with its ``batch``; without one, at once."""
    require_free(prepared.spec.publish)
    began = time.monotonic()
    with host.starting(batch) as mine, host.claim(name, prepared.digests, mine) as (folder, lease):
        spec = launch_spec(host, prepared, folder.path, name)
        async with booted(prepared, spec, [lease.fd]) as vmm:
            async with connect(folder.path / "monitor.sock") as monitor:
                ports = await published(monitor, prepared.spec.publish)
            return _up(prepared, folder, vmm, ports, time.monotonic() - began)


def _up(
    prepared: Prepared, folder: GuestFolder, vmm: Vmm, ports: Ports, seconds: float
) -> GuestRecord:
    record = GuestRecord(
        name=folder.name,
        kind="cold",
        source=prepared.root.ref,
        digest=prepared.root.digest,
        accel=prepared.accel.name,
        accel_reason=prepared.accel.reason,
        pid=vmm.pid,
        start_ticks=vmm.start_ticks,
        started=time.time(),
        start_seconds=seconds,
        memory=prepared.hardware.memory,
        ram_path=None,
        segments=machine.blob_names(prepared.placed),
        publish=ports,
    )
    folder.write(record)
    vmm.detach()
    return record
