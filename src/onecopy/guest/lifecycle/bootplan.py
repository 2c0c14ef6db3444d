"""Plans a boot: finds the parts of a guest in the store, or fetches them.

A guest may also be a bare machine: a bare kernel (images/sources/bare_kernel.py), without
segments and without onecopy's programs. Options that need the agent are refused for it. Not here:
how a guest boots (boot.py).
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from onecopy.errors import InsufficientResources, InvalidInput
from onecopy.guest import machine
from onecopy.guest.lifecycle.launchplan import Boot, BootSpec, LaunchPlan, check
from onecopy.guest.lifecycle.resources import ExtraResources
from onecopy.guest.machine import Placed, SystemConfig
from onecopy.guest.network import Network
from onecopy.guest.runtime import Runtime
from onecopy.guest.segment_costs import require_room
from onecopy.images.kernel import KernelConfig, ensure_kernel
from onecopy.images.range_record import SegmentConfig
from onecopy.images.tools import ensure_tools
from onecopy.model import MIB, Reference, align_up
from onecopy.store import Artifact, Store
from onecopy.vmm.accel import choose
from onecopy.vmm.cpu import qemu_cpu

#: Bytes of RAM that a guest needs to boot. QEMU 10.0.13 announces queues of 1024 entries, eight
#: times as many as other versions. Linux fills each entry with a page: 4 MiB for each virtio port.
MINIMUM_MEMORY = 128 * MIB


def plan_boot(
    host: Runtime, spec: BootSpec, progress: Callable[[str], None] = lambda _: None
) -> LaunchPlan:
    """Resolve names, fetch kernel and tools if the store lacks them, choose the accelerator.

    Args:
        progress: Called with a line of text at each step.

    Raises:
        NotFound, OtherDomain: A segment or kernel cannot be used.
        InvalidInput, InsufficientResources, Incompatible: No guest of the plan can start.
        OnecopyError: The kernel or the tools cannot be fetched or built.
    """
    bare = host.store.find(spec.root, "kernel")
    if bare and KernelConfig.of(bare).bare:
        return _plan_bare(host, spec, bare, progress)
    root = host.store.resolve(spec.root, "segment")
    extra = [(host.store.resolve(ref, "segment"), where) for ref, where in spec.segments]
    _require_memory(spec.memory)
    command = _command(spec, root)
    kernel = ensure_kernel(host.store, kernel=spec.kernel, modules=spec.modules, progress=progress)
    tools = ensure_tools(host.store, progress)
    domain = host.store.access(root.name).domain
    kernel, tools = (in_domain(host.store, each, domain) for each in (kernel, tools))
    placed = machine.place(root, tools, kernel, extra)
    require_room((item.segment.size for item in placed), align_up(spec.memory))
    others = (tools, kernel, *(artifact for artifact, _ in extra))
    return _plan(host, root, others, tuple(placed), Boot(spec, kernel, tools), command)


def _plan(
    host: Runtime,
    root: Artifact,
    others: tuple[Artifact, ...],
    placed: tuple[Placed, ...],
    boot: Boot,
    command: str | None = None,
) -> LaunchPlan:
    spec = boot.spec
    image = boot.kernel.layer("kernel").path
    accel = choose(spec.accel, host.qemu.binary, image, host.store.cache)
    config = SystemConfig(
        machine=host.qemu.machine,
        cpu=qemu_cpu(spec.cpu, accel.name),
        cpus=spec.cpus,
        memory=align_up(spec.memory),
        network=spec.network,
        accel=accel.name,
        qemu=host.qemu.version,
        kernel=KernelConfig.of(boot.kernel).release,
        root=root.ref,
        command=command,
        # Known only when the guest runs.
        machine_id=False,
        segments=tuple(item.segment for item in placed),
        agent=boot.tools is not None,
    )
    plan = LaunchPlan(
        spec=spec,
        source=root,
        artifacts=(root, *others),
        config=config,
        placed=placed,
        accel=accel,
        domain=host.store.access(root.name).domain,
        extra=ExtraResources(disks=spec.disks),
        hardware=machine.hardware_of(config),
        network=Network(spec.network, spec.bridge, spec.allow_host),
        boot=boot,
    )
    check(host, plan)
    return plan


def _plan_bare(
    host: Runtime, spec: BootSpec, bare: Artifact, progress: Callable[[str], None]
) -> LaunchPlan:
    """Plan like `plan_boot`; raise InvalidInput for options that a bare machine cannot have."""
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
                f"{option} does not apply to {bare.ref}, a bare kernel",
                hint="omit it, or boot a root segment",
            )
    _require_memory(spec.memory)
    kernel = ensure_kernel(host.store, progress=progress)
    # Without an agent its clones cannot get addresses of their own.
    return _plan(host, bare, (), (), Boot(replace(spec, network=False), kernel, None))


def in_domain(store: Store, artifact: Artifact, domain: str) -> Artifact:
    """Return an artifact for guests of a trust domain: a copy under a name of its own."""
    if not domain:
        return artifact
    ref = Reference(f"{artifact.name}.{domain}", artifact.version)
    found = store.find(ref, artifact.kind)
    return found or store.tag(Reference.parse(artifact.ref), ref, domain=domain, own=True)


def _command(spec: BootSpec, root: Artifact) -> str | None:
    """Return the command; None for the image's init. Raise InvalidInput if there is neither."""
    if spec.command is not None or has_init(root):
        return spec.command
    if spec.idle:
        return ""
    raise InvalidInput(
        f"{root.ref} has no init (/sbin/init), and no command is given",
        hint="give a command with --command CMD; --command '' keeps the guest up",
    )


def has_init(root: Artifact) -> bool:
    """Whether the image has an init, as recorded by images/build.py."""
    return bool(SegmentConfig.of(root).init)


def _require_memory(memory: int) -> None:
    if memory < MINIMUM_MEMORY:
        raise InsufficientResources(
            "memory for a guest",
            needed=MINIMUM_MEMORY,
            available=memory,
            hint=f"give at least --memory {MINIMUM_MEMORY // MIB}M",
        )
