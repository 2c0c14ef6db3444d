"""What a cold guest is made of: found, or fetched into the store, before anything runs.

It may also be a bare machine: a kernel by itself (images/sources/bare_kernel.py), with no segments
and nothing of ours in it; what needs an agent is refused of it. Not here: how it boots (boot.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec.structs import replace

from onecopy.errors import InsufficientResources, InvalidInput
from onecopy.guest import machine
from onecopy.guest.lifecycle.disks import DiskSpec
from onecopy.guest.machine import SystemConfig
from onecopy.guest.runtime import Runtime
from onecopy.guest.segment_costs import require_room
from onecopy.images.kernel import KernelConfig, ensure_kernel
from onecopy.images.range_record import SegmentConfig
from onecopy.images.tools import ensure_tools
from onecopy.model import MIB, Mergeable, Reference, align_up
from onecopy.store import Artifact, Store
from onecopy.vmm.accel import Accelerator, Choice, choose
from onecopy.vmm.argv import TRANSLATED, Hardware
from onecopy.vmm.cpu import DEFAULT, qemu_cpu

#: Bytes that a guest needs to come up. QEMU 10.0.13 tells guests of queues eight times as long as
#: others do (1024), which Linux fills with a page each: 4 MiB for every virtio port.
MINIMUM_MEMORY = 128 * MIB
DEFAULT_MEMORY = 256 * MIB


class BootSpec(msgspec.Struct, frozen=True):
    """What a user asks for when booting a guest."""

    root: Reference
    """A root segment, or a kernel by itself."""
    segments: tuple[tuple[Reference, str], ...] = ()
    """(segment, mount point) pairs; "" leaves it as a device."""
    memory: int = DEFAULT_MEMORY
    """Bytes."""
    cpus: int = 1
    cpu: str = DEFAULT
    """CPU model (vmm/cpu.py)."""
    command: str | None = None
    """Run with a minimal init, which with "" just stays up; None: the image's own init."""
    idle: bool = False
    """An image without an init just stays up: what it is to run comes later."""
    ready: str | None = None
    """A shell command that exits 0 in the guest once it is ready."""
    timeout: float = 300
    """Seconds that booting and getting ready may take."""
    network: bool = True
    bridge: str = ""
    """Of the host, to be a port of; "" for a user-mode network."""
    publish: tuple[tuple[int, int], ...] = ()
    allow_host: bool = False
    """Whether a user-mode network reaches what listens on the host."""
    ksm: Mergeable = Mergeable.RAM
    """A guest of a trust domain is closed to it all the same."""
    disks: tuple[DiskSpec, ...] = ()
    """They come once the guest is ready."""
    accel: Choice = Choice.AUTO
    translated: int = TRANSLATED
    """Bytes for translated code under TCG (admission.py)."""
    kernel: Path | None = None
    modules: Path | None = None


class BootPlan(msgspec.Struct, frozen=True):
    """Everything a cold guest needs, in the store; nothing runs yet."""

    spec: BootSpec
    root: Artifact
    artifacts: tuple[Artifact, ...]
    placed: tuple[machine.Placed, ...]
    kernel: Artifact
    """Linux: what guests with a root boot, and what KVM is tried with."""
    tools: Artifact | None
    """None for a bare machine."""
    accel: Accelerator
    hardware: Hardware
    """Without its segments, whose memory belongs to one guest (guest/backing.py)."""
    domain: str
    """The trust domain of its root, and so of the guest."""
    command: str | None = msgspec.field(default=None)

    @property
    def agent(self) -> bool:
        """Whether our agent is in the guest."""
        return self.tools is not None

    @property
    def digests(self) -> list[str]:
        """Manifests to hold while the guest runs."""
        return [artifact.digest for artifact in self.artifacts]


def plan_boot(
    host: Runtime, spec: BootSpec, progress: Callable[[str], None] = lambda _: None
) -> BootPlan:
    """Resolve names, fetch kernel and tools if the store lacks them, choose the accelerator.

    Raises NotFound, InvalidInput, OtherDomain, InsufficientResources, Incompatible, and what
    building raises.
    """
    bare = host.store.find(spec.root, "kernel")
    if bare and KernelConfig.of(bare).bare:
        return _prepare_bare(host, spec, bare, progress)
    root = host.store.resolve(spec.root, "segment")
    extra = [(host.store.resolve(ref, "segment"), where) for ref, where in spec.segments]
    _require_memory(spec.memory)
    run = _command(spec, root)
    kernel = ensure_kernel(host.store, kernel=spec.kernel, modules=spec.modules, progress=progress)
    tools = ensure_tools(host.store, progress)
    domain = host.store.access(root.name).domain
    kernel, tools = (in_domain(host.store, each, domain) for each in (kernel, tools))
    accel = _accelerator(host, spec, kernel)
    placed = machine.place(root, tools, kernel, extra)
    require_room((item.segment.size for item in placed), align_up(spec.memory))
    return BootPlan(
        spec=spec,
        root=root,
        artifacts=(root, tools, kernel, *(artifact for artifact, _ in extra)),
        placed=tuple(placed),
        kernel=kernel,
        tools=tools,
        accel=accel,
        hardware=_hardware(host, spec, accel),
        domain=domain,
        command=run,
    )


def system_config(host: Runtime, prepared: BootPlan) -> SystemConfig:
    """What the guest would be saved as; whether it has a machine-id it alone can tell."""
    hardware = prepared.hardware
    return SystemConfig(
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
        machine_id=False,
        segments=tuple(item.segment for item in prepared.placed),
        agent=prepared.agent,
    )


def _prepare_bare(
    host: Runtime, spec: BootSpec, bare: Artifact, progress: Callable[[str], None]
) -> BootPlan:
    """As `plan_boot`; raise InvalidInput for what a bare machine cannot have."""
    options = {
        "--segment": spec.segments,
        "--command": spec.command,
        "--ready": spec.ready,
        "--kernel": spec.kernel,
        "--modules": spec.modules,
    }
    for option, value in options.items():
        if value:
            raise InvalidInput(
                f"{option} does not go with {bare.ref}, a kernel by itself",
                hint="build a root segment for guests that are more than a bare machine",
            )
    # Nobody could tell its clones who they are in a network.
    spec = replace(spec, network=False)
    _require_memory(spec.memory)
    kernel = ensure_kernel(host.store, progress=progress)
    accel = _accelerator(host, spec, kernel)
    return BootPlan(
        spec=spec,
        root=bare,
        artifacts=(bare,),
        placed=(),
        kernel=kernel,
        tools=None,
        accel=accel,
        hardware=_hardware(host, spec, accel),
        domain=host.store.access(bare.name).domain,
    )


def _accelerator(host: Runtime, spec: BootSpec, kernel: Artifact) -> Accelerator:
    image = kernel.layer("kernel").path
    return choose(spec.accel, host.qemu.binary, image, host.store.cache)


def _hardware(host: Runtime, spec: BootSpec, accel: Accelerator) -> Hardware:
    return Hardware(
        machine=host.qemu.machine,
        cpu=qemu_cpu(spec.cpu, accel.name),
        cpus=spec.cpus,
        memory=align_up(spec.memory),
        network=spec.network,
        segments=(),
    )


def in_domain(store: Store, artifact: Artifact, domain: str) -> Artifact:
    """What comes with every guest, for those of a trust domain: a copy, under a name of its own."""
    if not domain:
        return artifact
    ref = Reference(f"{artifact.name}.{domain}", artifact.version)
    found = store.find(ref, artifact.kind)
    return found or store.tag(Reference.parse(artifact.ref), ref, domain=domain, own=True)


def _command(spec: BootSpec, root: Artifact) -> str | None:
    """None for the image's own init; raise InvalidInput if there is none, and nothing to run."""
    if spec.command is not None or has_init(root):
        return spec.command
    if spec.idle:
        return ""
    raise InvalidInput(
        f"{root.ref} has no init to boot (/sbin/init), and no command is given",
        hint="say what is to run in it: --command CMD; with --command '' the guest just stays up",
    )


def has_init(root: Artifact) -> bool:
    """Whether the image brings an init (images/build.py looked)."""
    return bool(SegmentConfig.of(root).init)


def _require_memory(memory: int) -> None:
    if memory < MINIMUM_MEMORY:
        raise InsufficientResources(
            "memory for a guest",
            needed=MINIMUM_MEMORY,
            available=memory,
            hint=f"give at least --memory {MINIMUM_MEMORY // MIB}M",
        )
