"""Plan a start from a saved system: the machine that must be there again, if this host has it.

Not here: how the saved state is loaded (restore.py).
"""

from __future__ import annotations

from onecopy.errors import Incompatible
from onecopy.guest import machine
from onecopy.guest.lifecycle.launchplan import CloneSpec, LaunchPlan
from onecopy.guest.lifecycle.resources import ExtraResources
from onecopy.guest.machine import SystemConfig
from onecopy.guest.runtime import Runtime
from onecopy.images.kernel import ensure_kernel
from onecopy.store import Artifact
from onecopy.vmm import open_notify
from onecopy.vmm.accel import Accelerator, Choice, choose


def plan_clone(host: Runtime, spec: CloneSpec) -> LaunchPlan:
    """Find a saved system, and check that it can be started here.

    Raises NotFound, Incompatible with the reason, StoreDamaged.
    """
    system = host.store.resolve(spec.system, "system")
    config = SystemConfig.of(system)
    host.qemu.require_machine(config.machine)
    open_notify.require(host.qemu)
    return LaunchPlan(
        spec=spec,
        source=system,
        artifacts=(system,),
        config=config,
        placed=tuple(machine.saved_places(system, config)),
        accel=_accelerator(host, spec.accel, system, config),
        domain=host.store.access(system.name).domain,
        extra=ExtraResources(spec.memory, spec.cpus, spec.segments, spec.disks),
    )


def _accelerator(
    host: Runtime, wanted: Choice, system: Artifact, config: SystemConfig
) -> Accelerator:
    """That of the saved system; raise Incompatible if another is wanted, or if it cannot be had."""
    if wanted not in (Choice.AUTO, Choice(config.accel)):
        raise Incompatible(
            f"{system.ref} was saved under {config.accel} and cannot be started under {wanted}",
            hint=f"leave --accel out, or save it again with --accel {wanted}",
        )
    # KVM is tried with a Linux: the kernel of a bare machine may be none.
    kernel = system if config.agent else ensure_kernel(host.store)
    image = kernel.layer("kernel").path
    chosen = choose(Choice(config.accel), host.qemu.binary, image, host.store.cache)
    return Accelerator(chosen.name, "the saved system's")
