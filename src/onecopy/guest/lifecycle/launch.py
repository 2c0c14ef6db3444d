"""What starting a guest has in common, cold or from a saved system: its VMM, and its record.

Not here: what is said to the VMM then (boot.py, restore.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from onecopy.errors import AgentFailed, GuestFailed, InvalidInput
from onecopy.guest.backing import Backing, backings, map_mode
from onecopy.guest.machine import Placed, SystemConfig
from onecopy.guest.network import inherited
from onecopy.guest.ports import Ports, require_free
from onecopy.guest.run_directory import Attached, Device, GuestRecord, RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.model import Mergeable
from onecopy.store import Artifact, Lease
from onecopy.vmm.accel import Accelerator
from onecopy.vmm.argv import FIRST_SEGMENT_SLOT, Hardware, Launch, Nic, Slot
from onecopy.vmm.qemu_process import Vmm, launch

T = TypeVar("T")
_ENDED = "QEMU ended while starting"
#: Seconds from losing QEMU's pipes to its end.
_ENDING = 0.2
#: QEMU's exit code for a command line that it cannot do, and what it says of a port (net/slirp.c).
_REFUSED, _NO_PORT = 1, "host forwarding rule"


def with_segments(hardware: Hardware, slots: Sequence[Slot]) -> Hardware:
    """The machine with the memory of its segments."""
    return replace(hardware, segments=tuple(slots))


def display_slots(placed: Sequence[Placed]) -> list[Slot]:
    """The memory of segments as a command line shows it that is not run."""
    return [
        Slot(
            item.layer.path if item.layer else Path(f"/proc/self/fd/{item.needed.memory_name}"),
            item.segment.size,
            map_mode(item.segment.page_class),
        )
        for item in placed
    ]


@contextlib.asynccontextmanager
async def started(
    host: Runtime, placed: Sequence[Placed], hardware: Hardware, spec: Launch, lease: Lease
) -> AsyncIterator[tuple[Vmm, list[Backing]]]:
    """Start the VMM of a guest with the memory of its segments, under its lease.

    On any error it is ended (`or_killed`). Raises InsufficientResources, NotPermitted,
    StoreDamaged, Incompatible, InUse (a port was taken meanwhile).
    """
    classes = [item.segment.page_class for item in placed]
    async with contextlib.AsyncExitStack() as life:
        async with backings(host, classes, lease) as found:
            backed = [found.back(item.needed) for item in placed]
            machine = with_segments(hardware, [each.slot for each in backed])
            given = replace(spec, later=lease.files)
            vmm = launch(machine, given, inherit=[lease.fd, *inherited(spec.card)])
            await life.enter_async_context(kill_on_error(vmm, spec.publish))
        yield vmm, backed


def record_launch(
    folder: RunDirectory,
    vmm: Vmm,
    *,
    kind: str,
    source: Artifact,
    accel: Accelerator,
    config: SystemConfig,
    placed: Sequence[Placed],
    backed: Sequence[Backing],
    domain: str,
    ram_path: str | None,
    publish: Ports,
    card: Nic | None,
    address: str,
    bridge: str,
) -> GuestRecord:
    """What is known of a guest whose VMM is up; what can be saved of it is noted in its folder."""
    config.write(folder.path)
    return GuestRecord(
        name=folder.name,
        kind=kind,
        source=source.ref,
        digest=source.digest,
        accel=accel.name,
        accel_reason=accel.reason,
        pid=vmm.pid,
        start_ticks=vmm.start_ticks,
        started=time.time(),
        start_seconds=0,
        memory=config.memory,
        cpus=config.cpus,
        ram_path=ram_path,
        publish=publish,
        mac=card.mac if card else "",
        address=address,
        bridge=bridge,
        allow_host=card is not None and card.allow_host,
        attached=tuple(_attached(placed, backed)),
        domain=domain,
        listener=vmm.listener,
        agent=config.agent,
        traced="-trace" in vmm.argv,
    )


def handed_out(folder: RunDirectory, vmm: Vmm, record: GuestRecord, began: float) -> GuestRecord:
    """Let the VMM of a guest that is as it was asked for live on; ``began`` is time.monotonic()."""
    record = msgspec.structs.replace(
        record, started=time.time(), start_seconds=time.monotonic() - began
    )
    folder.write(record)
    vmm.detach()
    return record


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


def require_mergeable(domain: str, ksm: Mergeable) -> None:
    """Raise InvalidInput if KSM were to merge memory across trust domains."""
    if ksm is Mergeable.ALL and domain:
        raise InvalidInput(
            f"KSM would merge memory of the trust domain {domain} with that of others",
            hint="start the guests without --ksm all",
        )


def open_to(ksm: Mergeable, domain: str) -> Mergeable:
    """What KSM may merge of a guest for which ``ksm`` is wanted: nothing of a trust domain's."""
    return Mergeable.NONE if domain else ksm


def segment_names(placed: Sequence[Placed]) -> list[str]:
    """The names of the segments that a guest has, as its access is checked by."""
    return sorted({item.segment.ref.partition(":")[0] for item in placed})


def _attached(placed: Sequence[Placed], backed: Sequence[Backing]) -> list[Attached]:
    """The record of the segments that a guest starts with; ranges of one lie side by side."""
    numbered = enumerate(zip(placed, backed, strict=True), start=FIRST_SEGMENT_SLOT)
    return [
        attached(
            [(item, each, f"00:{number:02x}") for number, (item, each) in ranges], state="loaded"
        )
        for _, ranges in groupby(numbered, key=lambda each: each[1][0].segment.ref)
    ]


def attached(
    ranges: Sequence[tuple[Placed, Backing, str]], *, state: str, exclusive: bool = False
) -> Attached:
    """The record of a segment in a guest: its ranges, their memory and their PCI addresses."""
    first = ranges[0][0].segment
    return Attached(
        name=first.name,
        ref=first.ref,
        digest=first.segment,
        devices=tuple(_device(*each) for each in ranges),
        mountpoint=first.mountpoint,
        state=state,
        exclusive=exclusive,
    )


def _device(placed: Placed, backed: Backing, address: str) -> Device:
    item = placed.segment
    return Device(item.page_class, item.size, item.fs, address, backed.mapped, backed.file)
