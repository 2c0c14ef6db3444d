"""Carry out a plan: start its VMM, let the guest become what was planned, and write its record.

One way for a guest that boots, for a clone, and for a VMM that waits to become one. Not here: what
is planned and refused (launchplan.py), what is said to a guest then (boot.py, restore.py), several
guests at once (start.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from msgspec.structs import replace

from onecopy.errors import AgentFailed, GuestFailed
from onecopy.guest import identity, machine
from onecopy.guest.backing import Backing, backings
from onecopy.guest.lifecycle import boot, device_state, restore
from onecopy.guest.lifecycle.launchplan import LaunchPlan
from onecopy.guest.lifecycle.resources import fit
from onecopy.guest.network import (
    can_be_closed,
    connecting,
    display_nic,
    inherited,
    new_nic,
    rehearse,
)
from onecopy.guest.pagecache import preload
from onecopy.guest.ports import Ports, published, require_free
from onecopy.guest.run_directory import Batch, GuestRecord, RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.store import Lease
from onecopy.vmm.argv import Launch, Nic, Ram, command
from onecopy.vmm.monitor import connect
from onecopy.vmm.qemu_process import Vmm, prepare
from onecopy.vmm.qemu_process import launch as launch_vmm

T = TypeVar("T")
_ENDED = "QEMU ended while starting"
_BOOT_ENDED = "the guest ended while starting"
#: Seconds from losing QEMU's pipes to its end.
_ENDING = 0.2
#: QEMU's exit code for a command line that it cannot do, and what it says of a port (net/slirp.c).
_REFUSED, _NO_PORT = 1, "host forwarding rule"


class Up(NamedTuple):
    """A guest whose VMM is up, and which is not handed out yet."""

    folder: RunDirectory
    vmm: Vmm
    record: GuestRecord
    connect: Callable[[], None]
    """Connects its network card, where that has not been done."""


async def launch(host: Runtime, plan: LaunchPlan, batch: Batch | None = None) -> GuestRecord:
    """Start the guest of a plan, which has a name and was checked.

    A clone gets a name and an identity of its own, as far as it can have one: nothing can be told
    to a bare machine. The guest is handed out with its ``batch``; without one, at once. Raises
    AlreadyExists if the name is taken by now, InUse if a port is, StoreDamaged, NotReady,
    GuestFailed, AgentFailed, Incompatible, and what it cannot be given (resources.py).
    """
    began = time.monotonic()
    with host.starting(batch) as mine:
        async with running(host, plan, mine) as up:
            record = up.record
            if plan.standby:
                up.folder.set_aside(record)
                up.vmm.detach()
                return record
            if plan.boot is None and plan.config.agent:
                known = plan.config.machine_id
                who = identity.new_identity(plan.name, card_of(record), machine_id=known)
                work = identity.become(up.folder.path, who, up.connect)
                record = replace(record, address=await race_exit(up.vmm, work))
            record = await race_exit(up.vmm, fit(host, mine, up.folder, record, plan.extra))
            took = time.monotonic() - began
            record = replace(record, started=time.time(), start_seconds=took)
            up.folder.write(record)
            up.vmm.detach()
            return record


@contextlib.asynccontextmanager
async def running(host: Runtime, plan: LaunchPlan, batch: Batch) -> AsyncIterator[Up]:
    """A guest that is up and ready, or runs on as who was saved; on any error its VMM is ended.

    The VMM of a clone is one that was prepared (pool.py), if there is one that suits.
    """
    if plan.can_be_prepared:
        suits = partial(can_be_closed, host)
        with host.taking(plan.source.digest, plan.name, batch, suits) as prepared:
            if prepared:
                folder, record = prepared
                vmm = restore.vmm_of(folder, record)
                async with kill_on_error(vmm):
                    record = await restore.wake(folder, record, plan.spec.publish)
                    yield Up(folder, vmm, record, connecting(None, ""))
                return
    async with _launched(host, plan, batch) as up:
        yield up


@contextlib.asynccontextmanager
async def _launched(host: Runtime, plan: LaunchPlan, batch: Batch) -> AsyncIterator[Up]:
    """A new VMM: booted and ready, or with the saved state."""
    saved = plan.boot is None
    with (
        host.claim(plan.name, plan.digests, batch) as (folder, lease),
        # In a bridge a clone is still taken for who was saved. Bare machines do not tell when no
        # more.
        new_nic(
            host, folder.path, plan.network, connected=not (saved and plan.config.agent)
        ) as card,
        # Not before it is leased: another command may remove it until then.
        device_state.checked(plan.source) if saved else contextlib.nullcontext() as devices,
    ):
        preload.begin_aside(host.store, [layer for each in plan.artifacts for layer in each.layers])
        if plan.boot and plan.boot.tools:
            boot.write_initrd(plan, plan.boot, folder.path, card)
        prepare(folder.path)
        spec = launch_spec(host, plan, folder.path, card)
        async with _spawned(host, plan, spec, lease) as (vmm, backed):
            if plan.boot and plan.boot.tools:
                await race_exit(vmm, boot.ready(folder.path, plan.boot.spec), _BOOT_ENDED)
                (folder.path / "initrd").unlink()
            async with connect(folder.path / "monitor.sock") as monitor:
                if devices is not None:
                    await restore.load(monitor, devices, runs=not plan.standby)
                # A bare machine that boots is up once QEMU answers.
                ports = await published(monitor, folder.path, plan.spec.publish)
            record = _record(plan, vmm, card, backed, ports)
            if card and plan.boot and not card.address:
                record = replace(record, address=await boot.given_address(folder.path))
            plan.config.write(folder.path)
            yield Up(folder, vmm, record, connecting(card, plan.spec.bridge if saved else ""))


@contextlib.asynccontextmanager
async def _spawned(
    host: Runtime, plan: LaunchPlan, spec: Launch, lease: Lease
) -> AsyncIterator[tuple[Vmm, list[Backing]]]:
    """Start the VMM of a guest with the memory of its segments, under its lease.

    On any error it is ended (`kill_on_error`). Raises InsufficientResources, NotPermitted,
    StoreDamaged, Incompatible, InUse (a port was taken meanwhile).
    """
    classes = [item.segment.page_class for item in plan.placed]
    async with contextlib.AsyncExitStack() as life:
        async with backings(host, classes, lease) as found:
            backed = [found.back(item.needed) for item in plan.placed]
            hardware = replace(plan.hardware, segments=tuple(each.slot for each in backed))
            passed = [lease.fd, *inherited(spec.card)]
            vmm = launch_vmm(hardware, replace(spec, later=lease.files), inherit=passed)
            await life.enter_async_context(kill_on_error(vmm, spec.publish))
        yield vmm, backed


def launch_spec(host: Runtime, plan: LaunchPlan, folder: Path, card: Nic | None) -> Launch:
    """How QEMU is told to start this guest."""
    return Launch(
        binary=host.qemu.binary,
        accel=plan.accel.name,
        name=folder.name,
        folder=folder,
        monitor_fd="FD",
        console_fd="FD",
        ram=Ram.ANONYMOUS if plan.boot else Ram.COPY_ON_WRITE,
        ram_path=None if plan.boot else plan.ram,
        rom=host.qemu.rom,
        traces=host.qemu.traces,
        kernel=boot.kernel_of(plan, plan.boot, folder) if plan.boot else None,
        card=card,
        publish=plan.spec.publish,
        ports_later=plan.standby,
        ksm=plan.mergeable,
        translated=plan.translated,
    )


def dry_run(host: Runtime, plan: LaunchPlan) -> list[str]:
    """The exact command line, but for the numbers of inherited sockets, and addresses.

    What only a try can tell is tried. Raises StoreDamaged, Incompatible.
    """
    rehearse(plan.network)
    if plan.boot is None:
        with device_state.checked(plan.source):
            pass
    spec = launch_spec(host, plan, host.run / plan.name, display_nic(plan.network))
    slots = machine.display_slots(plan.placed)
    return command(replace(plan.hardware, segments=slots), spec)


def _record(
    plan: LaunchPlan, vmm: Vmm, card: Nic | None, backed: list[Backing], publish: Ports
) -> GuestRecord:
    """What is known of a guest whose VMM is up."""
    return GuestRecord(
        name=plan.name,
        kind="cold" if plan.boot else "clone",
        source=plan.source.ref,
        digest=plan.source.digest,
        accel=plan.accel.name,
        accel_reason=plan.accel.reason,
        pid=vmm.pid,
        start_ticks=vmm.start_ticks,
        started=time.time(),
        start_seconds=0,
        memory=plan.config.memory,
        cpus=plan.config.cpus,
        ram_path=None if plan.boot else str(plan.ram),
        publish=publish,
        mac=card.mac if card else "",
        address=card.address if card else "",
        bridge=plan.spec.bridge,
        allow_host=card is not None and card.allow_host,
        attached=machine.loaded(plan.placed, backed),
        domain=plan.domain,
        listener=vmm.listener,
        agent=plan.config.agent,
        traced="-trace" in vmm.argv,
    )


def card_of(record: GuestRecord) -> Nic | None:
    """The network card as a guest is told of it."""
    return Nic(record.mac, record.address) if record.mac else None


async def race_exit(vmm: Vmm, work: Coroutine[Any, Any, T], ended: str = _ENDED) -> T:
    """Do ``work``, which does not see the VMM end: raise GuestFailed, saying ``ended``, then."""
    done, end = asyncio.ensure_future(work), asyncio.ensure_future(vmm.wait())
    try:
        await asyncio.wait({done, end}, return_when=asyncio.FIRST_COMPLETED)
        lost = done.done() and not done.cancelled() and isinstance(done.exception(), GuestFailed)
        if lost:
            # Its pipes and sockets end a moment before it does.
            await asyncio.wait({end}, timeout=_ENDING)
        if not done.done() or (lost and end.done()):
            code = vmm.returncode
            raise GuestFailed(ended if code is None else f"{ended} (QEMU's exit code {code})")
        return done.result()
    finally:
        done.cancel()
        end.cancel()
        await asyncio.gather(done, end, return_exceptions=True)


@contextlib.asynccontextmanager
async def kill_on_error(vmm: Vmm, publish: Ports = ()) -> AsyncIterator[None]:
    """On any error end the VMM; that QEMU or the agent failed then says what the guest printed.

    If QEMU ended because a port of ``publish`` was taken since it was looked at, that is InUse.
    """
    try:
        yield
    except GuestFailed as error:
        failed = await vmm.failed(error)
        if failed.returncode == _REFUSED and _NO_PORT in failed.output:
            require_free(publish)
        raise failed from error
    except AgentFailed as error:
        ended = await vmm.failed(GuestFailed(error.message))
        raise AgentFailed(ended.message, hint=error.hint) from error
    except BaseException:
        await vmm.kill()
        raise
