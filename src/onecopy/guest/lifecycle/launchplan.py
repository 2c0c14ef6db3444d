"""One start as a value: what a user asks for, and the plan that is made of it and checked.

A BootSpec or a CloneSpec says what is wanted. bootplan.py and cloneplan.py make a LaunchPlan of it,
launcher.py carries that out. Whatever can be refused is refused here (`check`, `check_guest`), for
a dry run as for a start. What changes after that the launcher meets: a name or port is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from onecopy.errors import InvalidInput
from onecopy.guest import machine, network
from onecopy.guest.lifecycle import disks
from onecopy.guest.lifecycle.disks import DiskSpec
from onecopy.guest.lifecycle.resources import ExtraResources, require_possible
from onecopy.guest.machine import Placed, SystemConfig
from onecopy.guest.network import Network
from onecopy.guest.ports import Ports, need_rights, require_free
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB, Mergeable, Reference
from onecopy.store import Artifact
from onecopy.vmm import spawn
from onecopy.vmm.accel import Accelerator, Choice
from onecopy.vmm.argv import TRANSLATED, Hardware
from onecopy.vmm.cpu import DEFAULT

DEFAULT_MEMORY = 256 * MIB


class GuestSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a user asks for of any guest."""

    segments: tuple[tuple[Reference, str], ...] = ()
    """(segment, mount point) pairs; "" leaves it as a device. A clone gets them as further ones."""
    publish: Ports = ()
    bridge: str = ""
    """Of the host, to be a port of; "" for a user-mode network."""
    allow_host: bool = False
    """Whether a user-mode network reaches what listens on the host."""
    ksm: Mergeable = Mergeable.RAM
    """A guest of a trust domain is closed to it all the same."""
    disks: tuple[DiskSpec, ...] = ()
    """They come once the guest is ready."""
    accel: Choice = Choice.AUTO


class BootSpec(GuestSpec, frozen=True):
    """What a user asks for when booting a guest."""

    root: Reference
    """A root segment, or a kernel by itself."""
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
    kernel: Path | None = None
    modules: Path | None = None


class CloneSpec(GuestSpec, frozen=True):
    """What a user asks for when starting a clone: what may differ from what was saved."""

    system: Reference
    memory: int | None = None
    """Bytes of RAM in all; None: as saved."""
    cpus: int | None = None
    """Processors in all; None: as saved."""

    @property
    def can_be_prepared(self) -> bool:
        """Whether all of it can be had of a VMM that was started before it was known."""
        special = self.bridge or self.allow_host or need_rights(self.publish)
        return self.ksm is Mergeable.RAM and not special


class Boot(msgspec.Struct, frozen=True):
    """What a guest boots that comes from no saved system."""

    spec: BootSpec
    kernel: Artifact
    """Linux: what guests with a root boot, and what KVM is tried with."""
    tools: Artifact | None
    """None for a bare machine."""
    words: str = ""
    """What else its kernel is told."""


class LaunchPlan(msgspec.Struct, frozen=True):
    """One guest that is to start: all of it is found and in the store, and nothing runs yet."""

    spec: GuestSpec
    source: Artifact
    """The root segment, the kernel by itself, or the saved system."""
    artifacts: tuple[Artifact, ...]
    """What is leased while the guest runs."""
    config: SystemConfig
    """The machine; what the guest would be saved as."""
    placed: tuple[Placed, ...]
    accel: Accelerator
    domain: str
    """The trust domain of the source, and so of the guest."""
    extra: ExtraResources
    """What comes once it runs."""
    boot: Boot | None = None
    """None: it starts from a saved system."""
    name: str = ""
    """The guest's; "" until it has one (`named`)."""
    standby: bool = False
    """Its VMM waits to become a clone later (pool.py)."""
    translated: int = TRANSLATED
    """Bytes for translated code under TCG (admission.py)."""

    def named(self, name: str, publish: Ports) -> LaunchPlan:
        """The same for the guest of that name, and with its ports."""
        return replace(self.varied(publish=publish), name=name)

    def varied(self, **changes: Any) -> LaunchPlan:
        """The same for a spec that differs in these fields, which decide nothing of the machine."""
        spec = replace(self.spec, **changes)
        boot = self.boot and replace(self.boot, spec=spec)
        return replace(self, spec=spec, boot=boot)

    @property
    def digests(self) -> list[str]:
        """Manifests to hold while the guest runs."""
        return [artifact.digest for artifact in self.artifacts]

    @property
    def hardware(self) -> Hardware:
        """Without its segments, whose memory belongs to one guest (guest/backing.py)."""
        return machine.hardware_of(self.config)

    @property
    def ram(self) -> Path:
        """The saved RAM; a guest that boots has none."""
        return self.source.layer("ram").path

    @property
    def network(self) -> Network:
        """What is asked for of its network."""
        spec = self.spec
        return Network(self.config.network, spec.bridge, spec.publish, spec.allow_host)

    @property
    def mergeable(self) -> Mergeable:
        """What KSM may merge of it: nothing of a trust domain's."""
        return Mergeable.NONE if self.domain else self.spec.ksm

    @property
    def added_memory(self) -> int:
        """Bytes of RAM that come to what the machine starts with."""
        return max((self.extra.memory or 0) - self.config.memory, 0)

    @property
    def can_be_prepared(self) -> bool:
        """Whether a VMM that was prepared can become this guest."""
        return isinstance(self.spec, CloneSpec) and self.spec.can_be_prepared and not self.standby


def check(host: Runtime, plan: LaunchPlan) -> None:
    """Raise for what keeps any guest of a plan from starting; nothing of the host changes.

    Raises InvalidInput, TooLarge, NotFound, NoSlot, AlreadyExists, NotPermitted, Incompatible.
    """
    so_far = "it boots" if plan.boot else f"{plan.source.ref} was saved"
    require_possible(host, plan.extra, plan.config, so_far)
    _require_mergeable(plan)
    network.check(plan.network, plan.accel.name)


def check_guest(host: Runtime, plan: LaunchPlan) -> None:
    """Raise for what keeps the guest of a plan from starting, and not others of the same.

    Raises AlreadyExists, InUse, NotPermitted, Restricted, OtherDomain, and what a disk is refused
    for (disks.py).
    """
    require_free(plan.spec.publish)
    loads = {item.segment.ref.partition(":")[0] for item in plan.placed}
    loads |= {plan.source.name} if plan.boot is None else set()
    loads |= {ref.name for ref, _ in plan.extra.segments}
    host.store.require_access(sorted(loads), plan.name, plan.domain)
    host.store.require_unheld(plan.name)
    disks.check_usable(host, plan.name, plan.extra.disks)


def _require_mergeable(plan: LaunchPlan) -> None:
    """Raise if KSM were to merge memory across trust domains, or cannot merge QEMU's own."""
    if plan.spec.ksm is not Mergeable.ALL:
        return
    if plan.domain:
        raise InvalidInput(
            f"KSM would merge memory of the trust domain {plan.domain} with that of others",
            hint="start the guests without --ksm all",
        )
    spawn.require_merging()
