"""Measures a few clones of a saved system, as the input of a forecast for many.

Not here: the forecast (sharing/forecast.py).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from onecopy.errors import GuestFailed
from onecopy.guest.lifecycle import start
from onecopy.guest.lifecycle.batch import turns
from onecopy.guest.lifecycle.launchplan import CloneSpec
from onecopy.guest.observe.accounts import report_of
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.linux import files, process
from onecopy.model import Reference
from onecopy.sharing.cross_check import Before, Check, check, look
from onecopy.sharing.forecast import Profile, Work
from onecopy.store import Artifact
from onecopy.subprocesses import run_shell
from onecopy.vmm import fork_registry

Tell = Callable[[str], None]


class Size(msgspec.Struct, frozen=True):
    """The size of a measurement."""

    first: int = 4
    """Number of first clones, which show the memory that all share."""
    more: int = 32
    """Number of further clones, which show the memory of each."""
    settle: float = 15.0
    """Seconds to wait before a measurement, and the length of the CPU measurement."""


_USUAL = Size()
_NONE = Work()


async def measure(
    host: Runtime,
    system: Artifact,
    size: Size = _USUAL,
    tell: Tell = lambda _: None,
    work: Work = _NONE,
) -> Profile:
    """Start clones, measure their memory, start time and CPU time, and end them.

    Raises:
        OnecopyError: Any error of starting clones, reading their memory, or ``work``.
    """
    spec = CloneSpec(
        system=Reference(system.name, digest=system.digest),
        publish=((0, work.port),) if work.port else (),
    )
    before = look(fork_registry.pids())
    started: list[GuestRecord] = []
    with host.owner() as owner:
        try:
            tell(f"starting {size.first} clones")
            started += (await _start(host, spec, size.first, owner))[0]
            await _run_work(work, started)
            await asyncio.sleep(size.settle)
            few = _check_memory(host, started, before)
            tell(f"starting {size.more} more")
            more, seconds = await _start(host, spec, size.more, owner)
            started += more
            await _run_work(work, more)
            tell(f"waiting {size.settle:g} s for the clones to become idle")
            await asyncio.sleep(size.settle)
            idle = await _idle(started, size.settle)
            many = _check_memory(host, started, before)
        finally:
            host.end(*started)
    own = many.parts - many.blobs - (few.parts - few.blobs)
    processors = os.cpu_count() or 1
    return Profile(
        system=system.ref,
        digest=system.digest,
        accel=started[0].accel,
        qemu=host.qemu.version,
        processors=processors,
        shared=many.blobs,
        each=max(own, 0) // size.more,
        start_cpu=seconds * processors / size.more,
        idle=idle,
        clones=size.first + size.more,
        work=work,
    )


async def _start(
    host: Runtime, spec: CloneSpec, count: int, owner: Path
) -> tuple[list[GuestRecord], float]:
    """Start clones; return them and the seconds until all were ready."""
    group = start.plan(host, start.Request(spec, count, name=f"plan-{secrets.token_hex(2)}"))
    began = time.monotonic()
    # Refilling pools would be measured, too.
    done = await start.start(host, group, owner=owner, refill=False)
    return list(done.guests), time.monotonic() - began


async def _run_work(work: Work, guests: list[GuestRecord]) -> None:
    """Run the command of ``work`` for each guest."""
    turn = turns()

    async def one(guest: GuestRecord) -> None:
        async with turn:
            await _run_command(work.command, guest)

    if work.command:
        await asyncio.gather(*map(one, guests))


async def _run_command(command: str, guest: GuestRecord) -> None:
    """Run a command in a shell of the host; raise GuestFailed if it fails."""
    known = {"GUEST": guest.name}
    if guest.publish:
        known["PORT"] = str(guest.publish[0][0])
    code, output = await run_shell(command, known)
    if code:
        raise GuestFailed(
            f"the command {command!r} for {guest.name} ended with exit code {code}: {output}"
        )


def _check_memory(host: Runtime, guests: list[GuestRecord], before: Before) -> Check:
    names = {guest.name for guest in guests}
    records = [each for each in host.guests() if each.name in names]
    return check(before, report_of(records))


async def _idle(guests: list[GuestRecord], seconds: float) -> float:
    """Return the mean share of a host CPU that an idle guest uses."""
    began, before = time.monotonic(), sum(process.cpu_seconds(each.pid) for each in guests)
    await asyncio.sleep(seconds)
    after = sum(process.cpu_seconds(each.pid) for each in guests)
    return (after - before) / (time.monotonic() - began) / len(guests)


def kept(host: Runtime, system: Artifact, work: Work = _NONE) -> Profile | None:
    """Return an earlier profile of this system with the same QEMU and ``work``; None without."""
    try:
        found = msgspec.json.decode(_path(host, system).read_bytes(), type=Profile)
    except (OSError, msgspec.DecodeError):
        return None
    return found if (found.qemu, found.work) == (host.qemu.version, work) else None


def keep(host: Runtime, system: Artifact, profile: Profile) -> None:
    """Store a profile for `kept`.

    Raises:
        OSError: The profile cannot be written.
    """
    files.replace(_path(host, system), msgspec.json.encode(profile))


def _path(host: Runtime, system: Artifact) -> Path:
    return host.store.cache / f"plan-{system.digest.partition(':')[2]}.json"
