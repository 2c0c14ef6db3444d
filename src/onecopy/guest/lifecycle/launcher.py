"""Carry out a plan: start its VMM, let the guest become what was planned, and write its record.

One way for a guest that boots, for a clone, and for a VMM that waits to become one. Not here: what
is planned and refused (launchplan.py), what is said to a guest then (boot.py, restore.py), several
guests at once (start.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from msgspec.structs import replace

from onecopy.errors import AgentFailed, GuestFailed
from onecopy.guest import identity
from onecopy.guest.backing import backings, display_slots, loaded
from onecopy.guest.lifecycle import boot, restore
from onecopy.guest.lifecycle.launchplan import LaunchPlan
from onecopy.guest.lifecycle.resources import NOTHING, fit
from onecopy.guest.lifecycle.snapshot import STATE_ROOM
from onecopy.guest.network import can_be_closed, display_nic, new_nic, rehearse
from onecopy.guest.pagecache import preload
from onecopy.guest.ports import Ports, published, require_free
from onecopy.guest.run_directory import Attached, Batch, GuestRecord, RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.linux.tap import connect_tap
from onecopy.model import Mergeable
from onecopy.store import Lease
from onecopy.store.sealed import sealed_layer
from onecopy.vmm.argv import Launch, Nic, Ram, command
from onecopy.vmm.monitor import connect
from onecopy.vmm.qemu_process import Vmm, prepare
from onecopy.vmm.qemu_process import launch as launch_vmm

T = TypeVar("T")
_ENDED = "QEMU ended while starting"
_BOOT_ENDED = "the guest ended while starting"
#: Seconds from losing QEMU's pipes to its end.
_ENDING = 0.2
#: The layer with the state of a saved system's devices: QEMU trusts what it reads there. One byte
#: more than it can have, and what a trust domain adds (store/domain.py).
_DEVICES = "state", "the device state", 2 * STATE_ROOM
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
    with contextlib.nullcontext(batch) if batch else host.starting() as mine:
        async with running(host, plan, mine) as up:
            record = up.record
            if plan.standby:
                up.folder.set_aside(record)
                up.vmm.detach()
                return record
            if plan.boot is None and plan.config.agent:
                machine_id = secrets.token_hex(16) if plan.config.machine_id else None
                who = identity.Identity(plan.name, machine_id, card_of(record))
                work = identity.become(up.folder.path, who, up.connect)
                record = replace(record, address=await race_exit(up.vmm, work))
            if plan.extra != NOTHING:
                given = fit(host, mine, up.folder, record, plan.extra)
                record = await race_exit(up.vmm, given)
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
    with contextlib.ExitStack() as ends:
        if plan.suits_standby:
            suits = partial(can_be_closed, host)
            prepared = host.taking(plan.source.digest, plan.name, batch, suits)
            if taken := ends.enter_context(prepared):
                vmm = restore.vmm_of(*taken)
                async with kill_on_error(vmm):
                    record = await restore.wake(*taken, plan.spec.publish)
                    yield Up(taken[0], vmm, record, _connected)
                return
        number = host.next_number()
        digests = [artifact.digest for artifact in plan.artifacts]
        folder, lease = ends.enter_context(host.claim(plan.name, digests, batch))
        # In a bridge a clone is still taken for who was saved; a bare machine cannot tell when it
        # no longer is.
        at_once = plan.boot is not None or not plan.config.agent
        card = ends.enter_context(new_nic(folder.path, plan.network, number, connected=at_once))
        # Not before it is leased: another command may remove it until then.
        state = None if plan.boot else ends.enter_context(sealed_layer(plan.source, *_DEVICES))
        preload.begin_aside(host.store, [layer for each in plan.artifacts for layer in each.layers])
        plan.config.write(folder.path)
        if plan.boot:
            boot.write_initrd(plan, plan.boot, folder.path, card)
        prepare(folder.path)
        spec = launch_spec(host, plan, folder.path, card)
        async with _spawned(host, plan, spec, lease) as (vmm, attached):
            yield await _come_up(plan, folder, vmm, spec, state, attached)


async def _come_up(
    plan: LaunchPlan,
    folder: RunDirectory,
    vmm: Vmm,
    spec: Launch,
    state: int | None,
    attached: tuple[Attached, ...],
) -> Up:
    """Wait until the guest is ready, or load its saved state and let it run on."""
    if plan.boot and plan.config.agent:
        await race_exit(vmm, boot.ready(folder.path, plan.boot.spec), _BOOT_ENDED)
        (folder.path / "initrd").unlink()
    # A bare machine that boots is up once QEMU answers.
    async with connect(folder.path) as monitor:
        if state is not None:
            await monitor.incoming(state)
            if not plan.standby:
                await monitor.execute("cont")
        ports = spec.publish and await published(monitor, folder.path, spec.publish)
    card, address = spec.card, spec.card.address if spec.card else ""
    if plan.boot and card and not address:
        address = await boot.given_address(folder.path)
    record = GuestRecord(
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
        ram_path=str(spec.ram_path) if spec.ram_path else None,
        publish=ports,
        mac=card.mac if card else "",
        address=address,
        bridge=plan.spec.bridge,
        allow_host=card is not None and card.allow_host,
        attached=attached,
        domain=plan.domain,
        listener=vmm.listener,
        agent=plan.config.agent,
        traced="-trace" in vmm.argv,
    )
    if plan.boot or not plan.spec.bridge or not card or not isinstance(card.tap, int):
        return Up(folder, vmm, record, _connected)
    return Up(folder, vmm, record, partial(connect_tap, card.tap, plan.spec.bridge))


def _connected() -> None:
    """Leave the network card: it is connected."""


@contextlib.asynccontextmanager
async def _spawned(
    host: Runtime, plan: LaunchPlan, spec: Launch, lease: Lease
) -> AsyncIterator[tuple[Vmm, tuple[Attached, ...]]]:
    """Start the VMM of a guest with the memory of its segments, under its lease.

    On any error it is ended (`kill_on_error`). Raises InsufficientResources, NotPermitted,
    StoreDamaged, Incompatible, InUse (a port was taken meanwhile).
    """
    classes = [item.segment.page_class for item in plan.placed]
    async with contextlib.AsyncExitStack() as life:
        async with backings(host, classes, lease) as found:
            backed = [found.back(item) for item in plan.placed]
            attached = loaded(plan.placed, backed)
            hardware = replace(plan.hardware, segments=tuple(each.slot for each in backed))
            passed = [lease.fd, *(spec.card.descriptors if spec.card else ())]
            vmm = launch_vmm(hardware, replace(spec, later=lease.files), inherit=passed)
            await life.enter_async_context(kill_on_error(vmm, spec.publish))
        yield vmm, attached


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
        ram_path=None if plan.boot else plan.source.layer("ram").path,
        rom=host.qemu.rom,
        traces=host.qemu.traces,
        kernel=boot.kernel_of(plan, plan.boot, folder) if plan.boot else None,
        card=card,
        publish=plan.spec.publish,
        ports_later=plan.standby,
        # KSM knows no trust domains.
        ksm=Mergeable.NONE if plan.domain else plan.spec.ksm,
        translated=plan.translated,
    )


def dry_run(host: Runtime, plan: LaunchPlan) -> list[str]:
    """The exact command line, but for the numbers of inherited sockets, and addresses.

    What only a try can tell is tried. Raises StoreDamaged, Incompatible.
    """
    rehearse(plan.network)
    if plan.boot is None:
        with sealed_layer(plan.source, *_DEVICES):
            pass
    spec = launch_spec(host, plan, host.run / plan.name, display_nic(plan.network))
    slots = display_slots(plan.placed)
    return command(replace(plan.hardware, segments=slots), spec)


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
