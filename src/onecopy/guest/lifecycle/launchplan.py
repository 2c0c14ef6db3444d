"""One start as a value: the user's request, and the checked plan that is made from it.

A BootSpec or a CloneSpec is the request. `plan_clone` makes a LaunchPlan from it; for boots,
bootplan.py does. launcher.py carries the plan out. The planners and `check_guest` refuse all that
can be refused in advance, for a dry run as for a start. The launcher handles later changes, such as
a name or port that was taken meanwhile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from onecopy.errors import Incompatible, InvalidInput
from onecopy.guest import machine, network
from onecopy.guest.lifecycle import disks
from onecopy.guest.lifecycle.disks import DiskSpec
from onecopy.guest.lifecycle.resources import NOTHING, ExtraResources, require_possible
from onecopy.guest.machine import Placed, SystemConfig
from onecopy.guest.network import Network
from onecopy.guest.ports import Ports, need_rights, require_free
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB, Mergeable, Reference
from onecopy.store import Artifact
from onecopy.vmm import open_notify, spawn
from onecopy.vmm.accel import Accelerator, Choice, choose
from onecopy.vmm.argv import TRANSLATED, Hardware
from onecopy.vmm.cpu import DEFAULT

DEFAULT_MEMORY = 256 * MIB


class GuestSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The options of any guest."""

    segments: tuple[tuple[Reference, str], ...] = ()
    """Further segments as pairs (segment, mount point); "" leaves a segment unmounted."""
    publish: Ports = ()
    bridge: str = ""
    """The host's bridge to connect to; "" for a user-mode network."""
    allow_host: bool = False
    """Whether the guest reaches the host's listening ports from a user-mode network."""
    ksm: Mergeable = Mergeable.RAM
    """The memory that KSM may merge; none for a guest of a trust domain."""
    disks: tuple[DiskSpec, ...] = ()
    """Disks, which are plugged in when the guest is ready."""
    accel: Choice = Choice.AUTO
    isolated_vmm: bool = False
    """Whether QEMU starts by exec, with addresses of its own, rather than from a fork server."""


class BootSpec(GuestSpec, frozen=True):
    """The options of a guest that boots."""

    root: Reference
    """A root segment, or a bare kernel."""
    memory: int = DEFAULT_MEMORY
    """Bytes of RAM."""
    cpus: int = 1
    cpu: str = DEFAULT
    """The CPU model (vmm/cpu.py)."""
    command: str | None = None
    """A command that a minimal init runs; "" only stays up. None: the image's own init."""
    idle: bool = False
    """Whether an image without an init stays up, for programs that run later."""
    ready: str | None = None
    """A shell command that exits with 0 in the guest when the guest is ready."""
    timeout: float = 300
    """Seconds for the guest to boot and become ready."""
    network: bool = True
    """Whether the guest has a network card."""
    kernel: Path | None = None
    """A kernel image; None: the kernel in the store."""
    modules: Path | None = None
    """The directory lib/modules/RELEASE of ``kernel``."""


class CloneSpec(GuestSpec, frozen=True):
    """The options of a clone, which may differ from its saved system."""

    system: Reference
    memory: int | None = None
    """Bytes of RAM in all; None: as saved."""
    cpus: int | None = None
    """Processors in all; None: as saved."""


class Boot(msgspec.Struct, frozen=True):
    """The parts that a booted guest starts from."""

    spec: BootSpec
    kernel: Artifact
    """The Linux that guests with a root segment boot, and that tests KVM."""
    tools: Artifact | None
    """None for a bare machine."""
    words: str = ""
    """Further words of the kernel's command line."""


class LaunchPlan(msgspec.Struct, frozen=True):
    """The plan of one guest: all parts are in the store, and nothing runs yet."""

    spec: GuestSpec
    source: Artifact
    """The root segment, the bare kernel, or the saved system."""
    artifacts: tuple[Artifact, ...]
    """The artifacts that the guest's lease holds."""
    config: SystemConfig
    """The machine, as a saved system would record it."""
    placed: tuple[Placed, ...]
    accel: Accelerator
    domain: str
    """The trust domain of the source and of the guest."""
    extra: ExtraResources
    """Resources that the guest gets when it runs."""
    hardware: Hardware
    """The hardware of ``config`` without segments, which each guest maps (guest/backing.py)."""
    network: Network
    boot: Boot | None = None
    """None for a guest that starts from a saved system."""
    name: str = ""
    """The guest's name; "" until `named` sets it."""
    standby: bool = False
    """Whether the VMM waits in a pool to become a clone (pool.py)."""
    suits_standby: bool = False
    """Whether a VMM that waits in a pool can become this guest."""
    translated: int = TRANSLATED
    """Bytes for translated code under TCG (admission.py)."""

    def named(self, name: str, publish: Ports) -> LaunchPlan:
        """Return the plan for one guest, with its name and ports."""
        spec = self.spec
        special = spec.bridge or spec.allow_host or (publish and need_rights(publish))
        plain = spec.ksm is Mergeable.RAM and not special and not spec.isolated_vmm
        return replace(
            self if publish == spec.publish else self.varied(publish=publish),
            name=name,
            suits_standby=plain and not self.boot and not self.standby,
        )

    def varied(self, **changes: Any) -> LaunchPlan:
        """Return the plan with changed options: ports, KSM or the readiness check."""
        spec = replace(self.spec, **changes)
        boot = self.boot and replace(self.boot, spec=spec)
        return replace(self, spec=spec, boot=boot)

    @property
    def ram(self) -> Path:
        """The file with the saved RAM; a guest that boots has none."""
        return self.source.layer("ram").path


def plan_clone(host: Runtime, spec: CloneSpec) -> LaunchPlan:
    """Find a saved system and check that this host can start it.

    Raises:
        NotFound: The saved system, or a segment for its clones, does not exist.
        Incompatible, StoreDamaged: The saved system cannot start here.
        InvalidInput, TooLarge, AlreadyExists: The clones cannot have what an option requests.
    """
    system = host.store.resolve(spec.system, "system")
    config = SystemConfig.of(system)
    host.qemu.require_machine(config.machine)
    open_notify.require(host.qemu)
    if spec.accel not in (Choice.AUTO, Choice(config.accel)):
        raise Incompatible(
            f"{system.ref} was saved under {config.accel} and cannot start under {spec.accel}",
            hint=f"omit --accel, or save it again with --accel {spec.accel}",
        )
    image = _linux(host, system, config).layer("kernel").path
    chosen = choose(Choice(config.accel), host.qemu.binary, image, host.store.cache)
    plan = LaunchPlan(
        spec=spec,
        source=system,
        artifacts=(system,),
        config=config,
        placed=tuple(machine.saved_places(system, config)),
        accel=Accelerator(chosen.name, "the saved system's"),
        domain=host.store.access(system.name).domain,
        extra=ExtraResources(spec.memory, spec.cpus, spec.segments, spec.disks),
        hardware=machine.hardware_of(config),
        network=Network(config.network, spec.bridge, spec.allow_host),
    )
    check(host, plan)
    return plan


def _linux(host: Runtime, system: Artifact, config: SystemConfig) -> Artifact:
    """Return the artifact with the Linux that the test of KVM boots."""
    if config.agent:
        return system
    # The kernel of a bare machine may be another system.
    from onecopy.images.kernel import ensure_kernel  # few systems are bare machines

    return ensure_kernel(host.store)


def check(host: Runtime, plan: LaunchPlan) -> None:
    """Check conditions that may keep every guest of a plan from starting; the host stays as it is.

    Raises:
        NotFound, AlreadyExists: A segment, or the bridge, cannot be had.
        InvalidInput, TooLarge, NotPermitted, Incompatible: No guest can have what an option asks.
    """
    if plan.extra != NOTHING:
        so_far = "it boots" if plan.boot else f"{plan.source.ref} was saved"
        require_possible(host, plan.extra, plan.config, so_far)
    if plan.spec.ksm is Mergeable.ALL:
        _require_merging(plan)
    network.check(plan.network, plan.spec.publish, plan.accel.name)


def check_guest(host: Runtime, plan: LaunchPlan) -> None:
    """Check conditions that may keep this guest from starting, but not others of the same plan.

    Raises:
        AlreadyExists, InUse, NotPermitted: The name or a port is taken, or not allowed.
        Restricted, OtherDomain: The guest may not load a segment or saved system.
        OnecopyError: A disk cannot be used (disks.py).
    """
    if plan.spec.publish:
        require_free(plan.spec.publish)
    loads = {item.segment.ref.partition(":")[0] for item in plan.placed}
    loads |= {plan.source.name} if plan.boot is None else set()
    loads |= {ref.name for ref, _ in plan.extra.segments}
    host.store.require_access(sorted(loads), plan.name, plan.domain)
    host.store.require_unheld(plan.name)
    if plan.extra.disks:
        disks.check_usable(host, plan.name, plan.extra.disks)


def _require_merging(plan: LaunchPlan) -> None:
    """Raise if KSM would merge memory across trust domains, or cannot merge QEMU's memory."""
    if plan.domain:
        raise InvalidInput(
            f"KSM would merge memory of the trust domain {plan.domain} with memory of others",
            hint="start the guests without --ksm all",
        )
    spawn.require_merging()
