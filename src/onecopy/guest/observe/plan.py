"""Measure a few clones of a saved system, so that it can be said what many will take.

Not here: the forecast itself (sharing/forecast.py).
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
from onecopy.guest.observe.accounts import guest_maps
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.linux import files, process
from onecopy.linux.counters import meminfo
from onecopy.model import Reference
from onecopy.sharing.cross_check import Before, Check, check
from onecopy.sharing.forecast import Profile, Work
from onecopy.sharing.report import collect
from onecopy.store import Artifact
from onecopy.subprocesses import run_shell

Tell = Callable[[str], None]


class Size(msgspec.Struct, frozen=True):
    """How much is measured."""

    first: int = 4
    """Clones for what all share."""
    more: int = 32
    """Clones beside them for what each has of its own."""
    settle: float = 15.0
    """Seconds for which they are left alone before they are looked at, and while they are."""


_USUAL = Size()
_NONE = Work()


async def measure(
    host: Runtime,
    system: Artifact,
    size: Size = _USUAL,
    tell: Tell = lambda _: None,
    work: Work = _NONE,
) -> Profile:
    """Start clones, look at them and end them.

    Raises what starts do, Incompatible, InsufficientResources; GuestFailed if ``work`` fails.
    """
    spec = CloneSpec(
        system=Reference(system.name, digest=system.digest),
        publish=((0, work.port),) if work.port else (),
    )
    before = Before(time.clock_gettime(time.CLOCK_BOOTTIME), meminfo.read())
    started: list[GuestRecord] = []
    with host.owner() as owner:
        try:
            tell(f"starting {size.first} clones")
            started += (await _start(host, spec, size.first, owner))[0]
            await _do(work, started)
            await asyncio.sleep(size.settle)
            few = _look(host, started, before)
            tell(f"starting {size.more} more")
            more, seconds = await _start(host, spec, size.more, owner)
            started += more
            await _do(work, more)
            tell("leaving them alone for a while")
            await asyncio.sleep(size.settle)
            idle = await _idle(started, size.settle)
            many = _look(host, started, before)
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
    """The guests, and how many seconds it took until they were handed out."""
    group = start.plan(host, start.Request(spec, count, name=f"plan-{secrets.token_hex(2)}"))
    began = time.monotonic()
    # What fills pools again would be measured, too.
    done = await start.start(host, group, owner=owner, refill=False)
    return list(done.guests), time.monotonic() - began


async def _do(work: Work, guests: list[GuestRecord]) -> None:
    """Work with each of them."""
    turn = turns()

    async def one(guest: GuestRecord) -> None:
        async with turn:
            await _command(work.command, guest)

    if work.command:
        await asyncio.gather(*map(one, guests))


async def _command(command: str, guest: GuestRecord) -> None:
    """Run it in a shell of the host; raise GuestFailed if it fails."""
    known = {"GUEST": guest.name}
    if guest.publish:
        known["PORT"] = str(guest.publish[0][0])
    code, said = await run_shell(command, known)
    if code:
        raise GuestFailed(f"{command!r} ended with exit code {code}: {said}")


def _look(host: Runtime, guests: list[GuestRecord], before: Before) -> Check:
    names = {guest.name for guest in guests}
    records = [each for each in host.guests() if each.name in names]
    return check(before, collect(guest_maps(records)))


async def _idle(guests: list[GuestRecord], seconds: float) -> float:
    """Share of a processor that each uses."""
    began, before = time.monotonic(), sum(process.cpu_seconds(each.pid) for each in guests)
    await asyncio.sleep(seconds)
    after = sum(process.cpu_seconds(each.pid) for each in guests)
    return (after - before) / (time.monotonic() - began) / len(guests)


def kept(host: Runtime, system: Artifact, work: Work = _NONE) -> Profile | None:
    """What was measured before of this system and ``work``, with the QEMU that the host has now."""
    try:
        found = msgspec.json.decode(_path(host, system).read_bytes(), type=Profile)
    except (OSError, msgspec.DecodeError):
        return None
    return found if (found.qemu, found.work) == (host.qemu.version, work) else None


def keep(host: Runtime, system: Artifact, profile: Profile) -> None:
    """Keep a profile for `kept`. Raises OSError."""
    files.replace(_path(host, system), msgspec.json.encode(profile))


def _path(host: Runtime, system: Artifact) -> Path:
    return host.store.cache / f"plan-{system.digest.partition(':')[2]}.json"
