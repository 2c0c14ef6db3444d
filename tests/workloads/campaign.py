"""Runs a workload in all its places, and collects the results.

Not here: the workloads (catalogue.py), power cuts and old systems (powercut.py, aged.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    said = _Said()
    if workload.chroot:
        tell(f"{workload.label}: chroot")
        command = workload.check
        if workload.setup:
            command = f"{{ {workload.setup}; }} >&2 && {workload.check}"
        said.add(expected.CHROOT, places.in_chroot(root, command, 2 * workload.timeout))
    with onecopy.Host(host.store.root) as api:
        used = _guests(api, host, workload, root, accel, tell, said)
    results = said.results
    wrong = expected.differences(workload.name, results) + expected.not_own(results)
    return Outcome(workload, used, results, wrong, said.texts)


class _Said:
    """What the programs printed, by place; `add` is called by several threads."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.results: dict[str, tap.Results] = {}

    def add(self, place: str, text: str) -> None:
        """Add what was printed at a place; raise Lost if it is not all of it."""
        try:
            self.results[place] = tap.parse(text)
        except tap.Lost as error:
            raise tap.Lost(f"{place}: {error}\n{text[-4000:]}") from error
        self.texts[place] = text


def _guests(
    api: onecopy.Host,
    host: Runtime,
    workload: Workload,
    root: Artifact,
    accel: str,
    tell: Tell,
    said: _Said,
) -> str:
    """Run a workload in a booted guest and its clones, all at once; return their accelerator."""
    options = BootOptions(
        segments=[f"{places.SEGMENT}:{places.MOUNTPOINT}"],
        memory=workload.memory,
        accel=accel,
        timeout=1200,
    )
    if not has_init(root):
        options["command"] = ""
    system = Reference(_SYSTEM, workload.name)
    # If this is interrupted the guests end first, and with them what the threads wait for.
    with ThreadPoolExecutor(1 + workload.clones) as pool, api.boot(root.ref, **options) as [guest]:
        if workload.setup:
            tell(f"{workload.label}: set up")
            places.in_guest(guest, workload.setup, workload.timeout)
        guest.save(str(system))
        try:
            tell(f"{workload.label}: booted, and {workload.clones} clones")
            with api.start(str(system), workload.clones, accel=accel) as clones:
                _check(pool, workload, [guest, *clones], said)
        finally:
            host.store.remove(system)
        return guest.record.accel


def _check(
    pool: ThreadPoolExecutor, workload: Workload, guests: Sequence[onecopy.Guest], said: _Said
) -> None:
    """Run the check in a booted guest and its clones."""

    def run(number: int) -> None:
        place = f"{expected.CLONE} {number}" if number else expected.BOOTED
        limit = workload.timeout * len(guests)
        said.add(place, places.in_guest(guests[number], workload.check, limit))

    list(pool.map(run, range(len(guests))))
