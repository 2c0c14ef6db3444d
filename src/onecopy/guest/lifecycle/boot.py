"""Gives a booting guest its kernel and initramfs, and waits until the guest is ready.

Not here: the plan of a boot (bootplan.py), the start of its VMM (launcher.py).
"""

from __future__ import annotations

import time
from pathlib import Path

from onecopy.errors import AgentFailed, GuestFailed, NotReady
from onecopy.guest import machine
from onecopy.guest.lifecycle.launchplan import Boot, BootSpec, LaunchPlan
from onecopy.images import initramfs
from onecopy.images.initramfs import TOOLS_MOUNTPOINT
from onecopy.images.kernel import KernelConfig, boot_image
from onecopy.vmm import guest_reply
from onecopy.vmm.agent import Agent
from onecopy.vmm.argv import Kernel, Nic, guest_network
from onecopy.vmm.tcg import kernel_words


def kernel_of(plan: LaunchPlan, boot: Boot, folder: Path) -> Kernel:
    """Return what QEMU boots: Linux with onecopy's initramfs, or a bare kernel."""
    if not boot.tools:
        return Kernel(plan.source.layer("kernel").path, None)
    words = kernel_words(plan.accel.name, plan.config.qemu, plan.config.cpu)
    image = boot_image(boot.kernel, plan.accel.name)
    return Kernel(image, folder / "initrd", words + boot.words)


def write_initrd(plan: LaunchPlan, boot: Boot, folder: Path, card: Nic | None) -> None:
    """Write the guest's initramfs into its run directory; a bare machine has none."""
    if boot.tools:
        wanted = initramfs.Boot(
            hostname=plan.name,
            network=guest_network(card),
            mounts=machine.mounts(plan.placed),
            modules=KernelConfig.of(boot.kernel).modules,
            command=plan.config.command,
        )
        modules, busybox = boot.kernel.layer("boot-modules"), boot.tools.layer("busybox")
        initramfs.write_initrd(folder / "initrd", wanted, modules, busybox)


async def ready(folder: Path, spec: BootSpec) -> None:
    """Wait for the agent, then until the readiness check succeeds; raise NotReady."""
    deadline = time.monotonic() + spec.timeout
    # The guest boots while this loads; a clone needs neither.
    from onecopy.guest.exec import run_captured
    from onecopy.vmm.monitor import connect

    # QEMU has opened its pipes when it answers.
    async with connect(folder):
        pass
    try:
        await Agent(folder).ping(spec.timeout)
    except AgentFailed:
        raise NotReady(
            f"the guest did not come up within {spec.timeout:g} s",
            hint="give a longer --timeout, or more --memory",
        ) from None
    script = spec.ready or _DEFAULT_READY
    left = max(deadline - time.monotonic(), 1)
    # The loop runs in the guest, so all attempts take one program.
    loop = f"until out=$({script}) 2>&1; do sleep 0.2; done"
    done = await run_captured(folder, ["sh", "-c", loop], timeout=left)
    if done.exit_code:
        last = await run_captured(folder, ["sh", "-c", script], timeout=10)
        raise NotReady(
            f"the guest is not ready after {spec.timeout:g} s; `{script}` last ended with exit "
            f"code {last.exit_code}: {guest_reply.shown(last.stdout + last.stderr, 500)}",
            hint="correct --ready, or give a longer --timeout",
        )


#: systemd is ready when its start-up jobs have ended, even if some failed. Any other init is ready
#: when it has replaced onecopy's second stage. A command of the user is ready when it has started.
_DEFAULT_READY = f"""
    case $(readlink /proc/1/exe) in
        */systemd) case $(systemctl is-system-running 2>/dev/null) in
            running|degraded) ;;
            *) false ;;
        esac ;;
        {TOOLS_MOUNTPOINT}/*) [ -e /run/onecopy/run ] ;;
    esac
"""


async def given_address(folder: Path) -> str:
    """Return the address that the guest got by DHCP (images/files/dhcp)."""
    from onecopy.guest.exec import run_captured  # a clone reports it otherwise

    done = await run_captured(folder, ["cat", "/run/onecopy/address"], timeout=30)
    if done.exit_code:
        raise GuestFailed(
            "the guest got no address by DHCP from the network of its bridge",
            hint="run a DHCP server in that network, or omit --bridge for a user-mode network",
        )
    return guest_reply.address(done.stdout, "the guest's address")
