"""Carries out a plan: starts the VMM, makes the guest ready, and writes its record.

Booted guests, clones and VMMs that wait in a pool all start here. Not here: plans and refusals
(launchplan.py), the guest's boot or wake-up (boot.py, restore.py), several guests at once
(start.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from msgspec.structs import replace

from onecopy.errors import AgentFailed, GuestFailed
from onecopy.guest.backing import backings, displayed, loaded
from onecopy.guest.lifecycle.launchplan import LaunchPlan
from onecopy.guest.lifecycle.resources import NOTHING
from onecopy.guest.machine import STATE_ROOM
from onecopy.guest.network import can_be_closed, display_nic, new_nic, rehearse
from onecopy.guest.pagecache import preload
from onecopy.guest.ports import Ports, published, require_free
from onecopy.guest.run_directory import REQUESTED, Attached, Batch, GuestRecord, RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.linux.tap import connect_tap
from onecopy.model import Mergeable
from onecopy.store import Lease
from onecopy.store.sealed import sealed_layer
from onecopy.vmm import fork_probe
from onecopy.vmm.argv import Launch, Nic, Ram, command
from onecopy.vmm.fork_server import ForkServer
from onecopy.vmm.qemu_process import Vmm, prepare
from onecopy.vmm.qemu_process import launch as launch_vmm

T = TypeVar("T")
_ENDED = "QEMU ended while starting"
_BOOT_ENDED = "the guest ended while starting"
#: Seconds that QEMU may run on after its pipes have closed.
_ENDING = 0.2
#: The layer with a saved system's device state, which QEMU trusts; its name in messages; and a size
#: limit with room for the bytes that a trust domain adds (store/domain.py).
_DEVICES = "state", "the device state", 2 * STATE_ROOM
#: QEMU's exit code for a failed command line, and its message for a taken port (net/slirp.c).
_REFUSED, _NO_PORT = 1, "host forwarding rule"


class Up(NamedTuple):
    """A guest whose VMM is up, before the guest is handed out."""

    folder: RunDirectory
    vmm: Vmm
    record: GuestRecord
    connect: Callable[[], None]
    """A function that connects the network card, unless it is connected."""


async def launch(host: Runtime, plan: LaunchPlan, batch: Batch | None = None) -> GuestRecord:
    """Start the guest of a plan that has a name and was checked; return its record.

    A clone gets a name and an identity of its own; a bare machine, without an agent, cannot.

    Args:
        batch: Hand the guest out with this batch; None hands it out at once.

    Raises:
        AlreadyExists, InUse: The name or a port was taken meanwhile.
        StoreDamaged, Incompatible: The saved system cannot be loaded.
        NotReady, GuestFailed, AgentFailed: The guest did not start.
        OnecopyError: The guest cannot get a resource (resources.py).
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
                from onecopy.guest import identity  # it loads while the guest wakes up

                machine_id = os.urandom(16).hex() if plan.config.machine_id else None
                who = identity.Identity(plan.name, machine_id, card_of(record))
                work = identity.become(up.folder.path, who, up.connect)
                record = replace(record, address=await race_exit(up.vmm, work))
            if plan.extra != NOTHING:
                # Most guests get nothing more.
                from onecopy.guest.lifecycle.hot_add import fit

                given = fit(host, mine, up.folder, record, plan.extra)
                record = await race_exit(up.vmm, given)
            took = time.monotonic() - began
            record = replace(record, started=time.time(), start_seconds=took)
            up.folder.write(record)
            up.vmm.detach()
            return record


@contextlib.asynccontextmanager
async def running(host: Runtime, plan: LaunchPlan, batch: Batch) -> AsyncIterator[Up]:
    """Yield a guest that is ready after boot, or a clone that still has its source's identity.

    A clone takes a ready VMM (pool.py) if one suits. Any error ends the VMM.
    """
    with contextlib.ExitStack() as ends:
        if plan.suits_standby:
            suits = partial(can_be_closed, host)
            prepared = host.taking(plan.source.digest, plan.name, batch, suits)
            if taken := ends.enter_context(prepared):
                from onecopy.guest.lifecycle import restore  # few guests were waiting

                vmm = restore.vmm_of(*taken)
                async with kill_on_error(vmm):
                    record = await restore.wake(*taken, plan.spec.publish)
                    yield Up(taken[0], vmm, record, _do_nothing)
                return
        number = host.next_number()
        digests = [artifact.digest for artifact in plan.artifacts]
        folder, lease = ends.enter_context(host.claim(plan.name, digests, batch))
        # Until a clone has its own identity, it would appear in a bridge with that of its source. A
        # bare machine cannot report a new identity, so its card is connected at once.
        at_once = plan.boot is not None or not plan.config.agent
        card = ends.enter_context(new_nic(folder.path, plan.network, number, connected=at_once))
        # Opened under the lease, because another command may remove the system before that.
        state = None if plan.boot else ends.enter_context(sealed_layer(plan.source, *_DEVICES))
        preload.begin_aside(host.store, [layer for each in plan.artifacts for layer in each.layers])
        plan.config.write(folder.path)
        if plan.boot:
            from onecopy.guest.lifecycle import boot  # a clone needs nothing of it

            boot.write_initrd(plan, plan.boot, folder.path, card)
        prepare(folder.path)
        spec = launch_spec(host, plan, folder.path, card)
        async with _spawn(host, plan, spec, lease) as (vmm, attached):
            yield await _come_up(plan, folder, vmm, spec, state, attached)


async def _come_up(
    plan: LaunchPlan,
    folder: RunDirectory,
    vmm: Vmm,
    spec: Launch,
    state: int | None,
    attached: tuple[Attached, ...],
) -> Up:
    """Wait until the guest is ready, or load its saved state and resume it."""
    if plan.boot and plan.config.agent:
        from onecopy.guest.lifecycle import boot

        await race_exit(vmm, boot.ready(folder.path, plan.boot.spec), _BOOT_ENDED)
        (folder.path / "initrd").unlink()
    ports = await _answer(plan, folder, spec, state)
    card, address = spec.card, spec.card.address if spec.card else ""
    if plan.boot and card and not address:
        from onecopy.guest.lifecycle import boot

        address = await boot.given_address(folder.path)
    record = GuestRecord(
        name=plan.name,
        kind="booted" if plan.boot else "clone",
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
        forked=vmm.forked,
        why_exec=vmm.why_exec,
    )
    return Up(folder, vmm, record, _connection(plan, card))


def _connection(plan: LaunchPlan, card: Nic | None) -> Callable[[], None]:
    if plan.boot or not plan.spec.bridge or not card or not isinstance(card.tap, int):
        return _do_nothing
    return partial(connect_tap, card.tap, plan.spec.bridge)


async def _answer(plan: LaunchPlan, folder: RunDirectory, spec: Launch, state: int | None) -> Ports:
    """Wait for QEMU's answer, load the saved state and resume it; return the published ports."""
    from onecopy.vmm.monitor import connect  # it loads while QEMU starts

    # A bare machine that boots is up when QEMU answers.
    async with connect(folder.path) as monitor:
        if state is not None:
            await monitor.incoming(state)
            if not plan.standby:
                await monitor.execute("cont")
        return spec.publish and await published(monitor, folder.path, spec.publish)


def _do_nothing() -> None:
    """Do nothing: the network card is connected."""


@contextlib.asynccontextmanager
async def _spawn(
    host: Runtime, plan: LaunchPlan, spec: Launch, lease: Lease
) -> AsyncIterator[tuple[Vmm, tuple[Attached, ...]]]:
    """Start a guest's VMM with the memory of its segments, under its lease.

    Any error ends the VMM (`kill_on_error`).

    Raises:
        InsufficientResources, NotPermitted: The host cannot provide a segment's memory.
        StoreDamaged, Incompatible: A segment cannot be mapped.
        InUse: A port was taken meanwhile.
    """
    classes = [item.segment.page_class for item in plan.placed]
    async with contextlib.AsyncExitStack() as life:
        async with backings(host, classes, lease) as found:
            backed = [found.back(item) for item in plan.placed]
            attached = loaded(plan.placed, backed)
            hardware = replace(plan.hardware, segments=tuple(backed))
            passed = [lease.fd, *(spec.card.descriptors if spec.card else ())]
            server, why_not = _fork_server(host, plan)
            vmm = launch_vmm(
                hardware, replace(spec, later=lease.files), inherit=passed, server=server
            )
            vmm.why_exec = vmm.why_exec or why_not
            await life.enter_async_context(kill_on_error(vmm, spec.publish))
        yield vmm, attached


def _fork_server(host: Runtime, plan: LaunchPlan) -> tuple[ForkServer | None, str]:
    """Return the server that is to fork a guest's VMM; None and the reason if none is."""
    if plan.spec.isolated_vmm:
        return None, REQUESTED
    found = fork_probe.find(host.qemu.binary, host.store.cache)
    if not found.path:
        return None, found.why_not
    # No store shares a server with another one.
    return ForkServer(found.path, host.run.name, plan.domain, plan.accel.name), ""


def launch_spec(host: Runtime, plan: LaunchPlan, folder: Path, card: Nic | None) -> Launch:
    """Return the settings with which QEMU starts this guest."""
    kernel = None
    if plan.boot:
        from onecopy.guest.lifecycle import boot

        kernel = boot.kernel_of(plan, plan.boot, folder)
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
        kernel=kernel,
        card=card,
        publish=plan.spec.publish,
        ports_later=plan.standby,
        # KSM merges memory across trust domains.
        ksm=Mergeable.NONE if plan.domain else plan.spec.ksm,
        translated=plan.translated,
    )


def dry_run(host: Runtime, plan: LaunchPlan) -> list[str]:
    """Return QEMU's exact command line, except for numbers of inherited sockets and addresses.

    Checks that need an attempt are carried out.

    Raises:
        StoreDamaged, Incompatible: The guest cannot start.
    """
    rehearse(plan.network)
    if plan.boot is None:
        with sealed_layer(plan.source, *_DEVICES):
            pass
    spec = launch_spec(host, plan, host.run / plan.name, display_nic(plan.network))
    slots = displayed(plan.placed)
    return command(replace(plan.hardware, segments=slots), spec)


def card_of(record: GuestRecord) -> Nic | None:
    """Return the network card for a guest's identity; None if it has none."""
    return Nic(record.mac, record.address) if record.mac else None


async def race_exit(vmm: Vmm, work: Coroutine[Any, Any, T], ended: str = _ENDED) -> T:
    """Do ``work``; if the VMM ends meanwhile, raise GuestFailed with the message ``ended``."""
    done, end = asyncio.ensure_future(work), asyncio.ensure_future(vmm.wait())
    try:
        await asyncio.wait({done, end}, return_when=asyncio.FIRST_COMPLETED)
        lost = done.done() and not done.cancelled() and isinstance(done.exception(), GuestFailed)
        if lost:
            # Its pipes and sockets close a moment before the VMM ends.
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
    """End the VMM after any error; add the guest's output to an error of QEMU or the agent.

    Raises:
        InUse: QEMU ended because a port of ``publish`` was taken after its check.
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
