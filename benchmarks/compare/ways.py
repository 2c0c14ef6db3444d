"""The ways to run the same guests, one function each.

Not here: the guests (mix.py), the measurement (run.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from benchmarks.answers import before, free_port, until
from benchmarks.compare.mix import PORT, SHELL, Ware
from benchmarks.compare.templating import Templates, start_from
from benchmarks.counts import Counts
from benchmarks.kinds import new_name
from benchmarks.plain import start_plain
from onecopy.errors import NotReady
from onecopy.guest.lifecycle.start import start_one as start_guest
from onecopy.guest.ports import Ports
from onecopy.guest.run_directory import GuestRecord
from onecopy.linux import process
from onecopy.model import Mergeable
from onecopy.vmm.qemu_process import Vmm, printed


@dataclass(frozen=True, slots=True)
class Up:
    """A guest whose application has answered."""

    ware: Ware
    pid: int
    shell: int
    """The port of 127.0.0.1 for its shell."""
    seconds: float
    """Seconds from the request until the application answered."""
    cpu: float
    """CPU seconds of its VMM until then."""
    counts: Counts
    """The counts of its VMM until then."""


@dataclass(frozen=True, slots=True)
class Means:
    """The means to start guests, besides their application."""

    ends: contextlib.AsyncExitStack
    """Ends the guests."""
    templates: Templates


Start = Callable[[Ware, str, Ports, Means], Awaitable[int]]
"""(ware, name, ports, means) -> the VMM's process id, once the application has answered."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run guests."""

    name: str
    start: Start
    ksm: bool = False
    """Whether KSM runs throughout."""


async def start_one(way: Way, ware: Ware, means: Means) -> Up:
    """Start a guest and wait until its application answers."""
    port, shell = free_port(), free_port()
    name, began = new_name(), time.monotonic()
    pid = await way.start(ware, name, ((port, PORT), (shell, SHELL)), means)
    seconds = time.monotonic() - began
    return Up(ware, pid, shell, seconds, process.cpu_seconds(pid), Counts.of(pid))


async def _plain(ware: Ware, name: str, ports: Ports, means: Means) -> int:
    vmm = start_plain(ware.setup, name, ware.application.command, ports)
    return await _watched(vmm, ware, name, ports, means)


async def _template(ware: Ware, name: str, ports: Ports, means: Means) -> int:
    vmm = await start_from(await means.templates.of(ware), ware.setup, name, ports)
    return await _watched(vmm, ware, name, ports, means)


async def _watched(vmm: Vmm, ware: Ware, name: str, ports: Ports, means: Means) -> int:
    """Raise GuestFailed if the VMM ends before the application answers, NotReady if none comes."""
    means.ends.push_async_callback(vmm.kill)
    try:
        await before(vmm.wait(), _answered(ware, name, ports))
    except NotReady as error:
        raise NotReady(f"{error.message}; it printed:\n{printed(vmm.folder)}") from error
    return vmm.pid


async def _segment(ware: Ware, name: str, ports: Ports, means: Means) -> int:
    plan = ware.setup.prepared.varied(publish=ports)
    record = await start_guest(ware.setup.host, plan, name)
    return await _ours(record, ware, ports, means)


def _saved(ksm: Mergeable) -> Start:
    async def start(ware: Ware, name: str, ports: Ports, means: Means) -> int:
        plan = ware.setup.saved.varied(publish=ports, ksm=ksm)
        record = await start_guest(ware.setup.host, plan, name)
        return await _ours(record, ware, ports, means)

    return start


async def _ours(record: GuestRecord, ware: Ware, ports: Ports, means: Means) -> int:
    means.ends.callback(ware.setup.host.end, record)
    await _answered(ware, record.name, ports)
    return record.pid


async def _answered(ware: Ware, name: str, ports: Ports) -> None:
    await until(lambda: ware.ask(ports[0][0]), name)


#: All ways, in the order of the tables. With `all`, KSM merges the VMMs' own memory, too.
WAYS = (
    Way("none", _plain),
    Way("ksm", _plain, ksm=True),
    Way("xip", _segment),
    Way("template", _template),
    Way("saved+xip", _saved(Mergeable.RAM)),
    Way("all", _saved(Mergeable.ALL), ksm=True),
)
