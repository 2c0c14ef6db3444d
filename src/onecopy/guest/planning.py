"""Measure a few clones of a saved system, so that it can be said what many will take.

Not here: the forecast itself (sharing/forecast.py).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from onecopy.errors import GuestFailed
from onecopy.guest import admission
from onecopy.guest.exec import run_captured
from onecopy.guest.folder import Batch, GuestRecord
from onecopy.guest.host import Host
from onecopy.guest.many import names_for, start_many
from onecopy.guest.maps import guest_maps
from onecopy.guest.start import Template, start_clone, template
from onecopy.host import files, meminfo, process
from onecopy.sharing.check import Before, Check, check
from onecopy.sharing.forecast import Profile
from onecopy.sharing.report import collect
from onecopy.store import Artifact

Tell = Callable[[str], None]


class Size(msgspec.Struct, frozen=True):
    """How much is measured."""

    first: int = 4
    """Clones for what all share."""
    more: int = 16
    """Clones beside them for what each has of its own."""
    settle: float = 15.0
    """Seconds for which they are left alone before they are looked at, and while they are."""


_USUAL = Size()


async def measure(
    host: Host,
    system: Artifact,
    size: Size = _USUAL,
    tell: Tell = lambda _: None,
    work: str = "",
) -> Profile:
    """Start clones, look at them and end them. Each runs the shell command ``work`` before.

    Raises what starts do, Incompatible, NotEnough; GuestFailed if ``work`` fails.
    """
    source = template(host, system)
    names = names_for("plan", None, size.first + size.more)
    before = Before(time.clock_gettime(time.CLOCK_BOOTTIME), meminfo.read())
    started: list[GuestRecord] = []
    with host.owner() as owner:
        try:
            tell(f"starting {size.first} clones")
            started += (await _start(host, source, names[: size.first], owner))[0]
            await _work(host, started, work)
            await asyncio.sleep(size.settle)
            few = _look(host, started, before)
            tell(f"starting {size.more} more")
            more, seconds = await _start(host, source, names[size.first :], owner)
            started += more
            await _work(host, more, work)
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
        accel=source.accel.name,
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
    host: Host, source: Template, names: list[str], owner: Path
) -> tuple[list[GuestRecord], float]:
    """The guests, and how many seconds it took until they were handed out."""

    def start(name: str, batch: Batch) -> asyncio.Future[GuestRecord]:
        return asyncio.ensure_future(start_clone(host, source, name, batch=batch))

    began = time.monotonic()
    each = admission.of_clone(source.accel.name)
    done = await start_many(host, names, start, owner=owner, each=each)
    return list(done.guests), time.monotonic() - began


async def _work(host: Host, guests: list[GuestRecord], command: str) -> None:
    """Let each run it, as many at once as there are processors."""
    turn = asyncio.Semaphore(os.cpu_count() or 1)

    async def one(name: str) -> None:
        async with turn:
            done = await run_captured(host.run / name, ["sh", "-c", command])
        if done.exit_code:
            said = (done.stderr or done.stdout).decode(errors="replace").strip()
            raise GuestFailed(f"{command!r} ended with exit code {done.exit_code}: {said}")

    if command:
        await asyncio.gather(*(one(guest.name) for guest in guests))


def _look(host: Host, guests: list[GuestRecord], before: Before) -> Check:
    names = {guest.name for guest in guests}
    records = [each for each in host.guests() if each.name in names]
    return check(before, collect(guest_maps(records)))


async def _idle(guests: list[GuestRecord], seconds: float) -> float:
    """Share of a processor that each uses."""
    began, before = time.monotonic(), sum(process.cpu_seconds(each.pid) for each in guests)
    await asyncio.sleep(seconds)
    after = sum(process.cpu_seconds(each.pid) for each in guests)
    return (after - before) / (time.monotonic() - began) / len(guests)


def kept(host: Host, system: Artifact, work: str = "") -> Profile | None:
    """What was measured before of this system and ``work``, with the QEMU that the host has now."""
    try:
        found = msgspec.json.decode(_path(host, system).read_bytes(), type=Profile)
    except (OSError, msgspec.DecodeError):
        return None
    return found if (found.qemu, found.work) == (host.qemu.version, work) else None


def keep(host: Host, system: Artifact, profile: Profile) -> None:
    """Keep a profile for `kept`. Raises OSError."""
    files.replace(_path(host, system), msgspec.json.encode(profile))


def _path(host: Host, system: Artifact) -> Path:
    return host.store.cache / f"plan-{system.digest.partition(':')[2]}.json"
