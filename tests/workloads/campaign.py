"""Runs a workload in all its places, and collects the results.

Not here: the workloads (catalogue.py), power cuts and old systems (powercut.py, aged.py).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

import onecopy
from onecopy.aio.options import BootOptions
from onecopy.guest.lifecycle.bootplan import has_init
from onecopy.guest.runtime import Runtime
from onecopy.images.build import build_segment
from onecopy.model import Reference
from onecopy.store import Artifact
from tests.workloads import expected, places, tap
from tests.workloads.catalogue import Workload

_SYSTEM = "workload"

Tell = Callable[[str], None]


class Outcome(msgspec.Struct, frozen=True):
    """What came of a workload."""

    workload: Workload
    accel: str
    results: dict[str, tap.Results]
    """By place: "chroot", "booted", "clone 1"..."""
    wrong: list[str]
    """Empty if all is as it must be."""
    said: dict[str, str]
    """What the programs printed, by place."""


def ensure_programs(host: Runtime) -> None:
    """Build the segment of programs; it is the same while they are."""
    build_segment(host.store, Reference(places.SEGMENT), f"dir:{places.PROGRAMS}")


def run(host: Runtime, workload: Workload, root: Artifact, accel: str, tell: Tell) -> Outcome:
    """Run a workload everywhere. Raises Lost if a place does not give all its results."""
    said: dict[str, str] = {}
    if workload.chroot:
        tell(f"{workload.label}: chroot")
        command = workload.check
        if workload.setup:
            command = f"{{ {workload.setup}; }} >&2 && {workload.check}"
        said[expected.CHROOT] = places.in_chroot(root, command, 2 * workload.timeout)
    with onecopy.Host(host.store.root) as api:
        used = _guests(api, host, workload, root, accel, tell, said)
    results = {}
    for place, text in said.items():
        try:
            results[place] = tap.parse(text)
        except tap.Lost as error:
            raise tap.Lost(f"{place}: {error}\n{text[-4000:]}") from error
    wrong = expected.differences(workload.name, results)
    wrong += expected.not_own(results)
    return Outcome(workload, used, results, wrong, said)


def _guests(
    api: onecopy.Host,
    host: Runtime,
    workload: Workload,
    root: Artifact,
    accel: str,
    tell: Tell,
    said: dict[str, str],
) -> str:
    """Run a workload in a booted guest and in clones; return their accelerator."""
    options = BootOptions(
        segments=[f"{places.SEGMENT}:{places.MOUNTPOINT}"],
        memory=workload.memory,
        accel=accel,
        timeout=1200,
    )
    if not has_init(root):
        options["command"] = ""
    system = Reference(_SYSTEM, workload.name)
    with api.boot(root.ref, **options) as [guest]:
        if workload.setup:
            tell(f"{workload.label}: set up")
            places.in_guest(guest, workload.setup, workload.timeout)
        guest.save(str(system))
        try:
            tell(f"{workload.label}: booted")
            said[expected.BOOTED] = places.in_guest(guest, workload.check, workload.timeout)
            guest.stop()
            tell(f"{workload.label}: {workload.clones} clones")
            said.update(_clones(api, workload, str(system), accel))
        finally:
            host.store.remove(system)
        return guest.record.accel


def _clones(api: onecopy.Host, workload: Workload, system: str, accel: str) -> dict[str, str]:
    count = workload.clones
    # If this is interrupted the guests end first, and with them what the threads wait for.
    with (
        ThreadPoolExecutor(count) as pool,
        api.start(system, count, accel=accel) as guests,
    ):
        texts = pool.map(
            lambda guest: places.in_guest(guest, workload.check, workload.timeout * count), guests
        )
        return {f"{expected.CLONE} {n}": text for n, text in enumerate(texts, 1)}
