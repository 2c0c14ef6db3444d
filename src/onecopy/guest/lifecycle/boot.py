"""Booting a cold guest: as a guest of its own, or as the one that is about to be saved.

A bare machine (bootplan.py) is up once QEMU is. Not here: what a guest is made of.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

from onecopy.errors import AgentFailed, GuestFailed, NotReady
from onecopy.guest import machine
from onecopy.guest.backing import Backing
from onecopy.guest.exec import Completed, run_captured
from onecopy.guest.lifecycle.bootplan import BootPlan, BootSpec, system_config
from onecopy.guest.lifecycle.launch import (
    display_slots,
    handed_out,
    open_to,
    race_exit,
    record_launch,
    require_mergeable,
    segment_names,
    started,
    with_segments,
)
from onecopy.guest.lifecycle.resources import ExtraResources, fit, require_possible
from onecopy.guest.network import Network, display_nic, new_nic, settings
from onecopy.guest.pagecache import preload
from onecopy.guest.ports import published, require_free
from onecopy.guest.run_directory import Batch, GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.images.initramfs import TOOLS_MOUNTPOINT, Boot, write_initrd
from onecopy.images.kernel import KernelConfig
from onecopy.store import Artifact, Lease
from onecopy.vmm import guest_reply
from onecopy.vmm.agent import Agent
from onecopy.vmm.argv import Kernel, Launch, Nic, Ram, command
from onecopy.vmm.monitor import connect
from onecopy.vmm.qemu_process import Vmm, prepare
from onecopy.vmm.tcg import kernel_words

_ENDED = "the guest ended while starting"


def launch_spec(
    host: Runtime, prepared: BootPlan, folder: Path, name: str, card: Nic | None
) -> Launch:
    """How QEMU is told to boot this guest."""
    return Launch(
        binary=host.qemu.binary,
        accel=prepared.accel.name,
        name=name,
        folder=folder,
        monitor_fd="FD",
        console_fd="FD",
        ram=Ram.ANONYMOUS,
        rom=host.qemu.rom,
        traces=host.qemu.traces,
        kernel=_booted_kernel(host, prepared, folder),
        card=card,
        publish=prepared.spec.publish,
        ksm=open_to(prepared.spec.ksm, prepared.domain),
        translated=prepared.spec.translated,
    )


def _booted_kernel(host: Runtime, prepared: BootPlan, folder: Path) -> Kernel:
    if prepared.agent:
        append = kernel_words(prepared.accel.name, host.qemu.version, prepared.hardware.cpu)
        return Kernel(prepared.kernel.layer("kernel").path, folder / "initrd", append)
    return Kernel(prepared.root.layer("kernel").path, None)


def dry_run(host: Runtime, prepared: BootPlan, name: str) -> list[str]:
    """The exact command line, but for the numbers of inherited sockets, and addresses."""
    _require_possible(host, prepared)
    folder = host.run / name
    card = display_nic(network_of(prepared.spec))
    spec = launch_spec(host, prepared, folder, name, card)
    return command(with_segments(prepared.hardware, display_slots(prepared.placed)), spec)


@contextlib.asynccontextmanager
async def booted(
    host: Runtime, prepared: BootPlan, spec: Launch, lease: Lease
) -> AsyncIterator[tuple[Vmm, list[Backing]]]:
    """Boot, wait until the guest is ready; on any error the VMM is ended."""
    preload.begin_aside(host.store, [layer for each in prepared.artifacts for layer in each.layers])
    if prepared.tools:
        _write_initrd(prepared, prepared.tools, spec)
    prepare(spec.folder)
    async with started(host, prepared.placed, prepared.hardware, spec, lease) as (vmm, backed):
        if prepared.agent:
            await race_exit(vmm, _ready(vmm.folder, prepared.spec), _ENDED)
            (spec.folder / "initrd").unlink()
        yield vmm, backed


def _write_initrd(prepared: BootPlan, tools: Artifact, spec: Launch) -> None:
    write_initrd(
        spec.folder / "initrd",
        Boot(
            hostname=spec.name,
            network=settings(spec.card),
            mounts=machine.mounts(prepared.placed),
            modules=KernelConfig.of(prepared.kernel).modules,
            command=prepared.command,
        ),
        prepared.kernel.layer("boot-modules"),
        tools.layer("busybox"),
    )


async def _ready(folder: Path, spec: BootSpec) -> None:
    """Wait for the agent, then for the sign of readiness; raise NotReady."""
    deadline = time.monotonic() + spec.timeout
    # Once QEMU answers it has its pipes open.
    async with connect(folder / "monitor.sock"):
        pass
    try:
        await Agent(folder).ping(spec.timeout)
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
            f"{last.exit_code}: {guest_reply.shown(last.stdout + last.stderr, 500)}",
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


async def boot_guest(
    host: Runtime, prepared: BootPlan, name: str, batch: Batch | None = None
) -> GuestRecord:
    """Boot a guest. It is handed out with its ``batch``; without one, at once."""
    wanted = prepared.spec
    _require_possible(host, prepared)
    require_free(wanted.publish)
    began = time.monotonic()
    require_mergeable(prepared.domain, wanted.ksm)
    host.store.require_access(segment_names(prepared.placed), name, prepared.domain)
    with (
        host.starting(batch) as mine,
        host.claim(name, prepared.digests, mine) as (folder, lease),
        new_nic(host, folder.path, network_of(wanted)) as card,
    ):
        spec = launch_spec(host, prepared, folder.path, name, card)
        async with booted(host, prepared, spec, lease) as (vmm, backed):
            # A bare machine is up once QEMU answers.
            async with connect(folder.path / "monitor.sock") as monitor:
                ports = await published(monitor, folder.path, wanted.publish)
            address = card.address or await _given_address(folder.path) if card else ""
            record = record_launch(
                folder,
                vmm,
                kind="cold",
                source=prepared.root,
                accel=prepared.accel,
                config=system_config(host, prepared),
                placed=prepared.placed,
                backed=backed,
                domain=prepared.domain,
                ram_path=None,
                publish=ports,
                card=card,
                address=address,
                bridge=wanted.bridge,
            )
            folder.write(record)
            fitting = ExtraResources(disks=wanted.disks)
            record = await race_exit(vmm, fit(host, mine, folder, record, fitting))
            return handed_out(folder, vmm, record, began)


def network_of(spec: BootSpec) -> Network:
    """What is asked for of its network."""
    return Network(spec.network, spec.bridge, spec.publish, spec.allow_host)


def _require_possible(host: Runtime, prepared: BootPlan) -> None:
    config = system_config(host, prepared)
    require_possible(host, ExtraResources(disks=prepared.spec.disks), config, "it boots")


async def _given_address(folder: Path) -> str:
    """The address that its network has given the guest (images/files/dhcp)."""
    done = await run_captured(folder, ["cat", "/run/onecopy/address"], timeout=30)
    if done.exit_code:
        raise GuestFailed(
            "the guest was given no address in the network of its bridge",
            hint="that takes a DHCP server there; leave --bridge out for a user-mode network",
        )
    return guest_reply.address(done.stdout, "the guest's address")
