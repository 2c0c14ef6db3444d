"""The full table of ends: each end, under each init, of booted guests and of clones.

It takes long and runs only by its name (`pytest tests/workloads/ends_table.py`). The short form is
tests/vm/test_ends.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

import pytest

from onecopy.guest.lifecycle.batch import start_many
from onecopy.guest.lifecycle.launchplan import BootSpec, LaunchPlan
from onecopy.guest.lifecycle.save import save_system
from onecopy.guest.lifecycle.start import plan_launch
from onecopy.guest.lifecycle.stop import Ending, Stopped, stop_guests
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB, Reference
from tests.vm.conftest import busybox_init_root, busybox_root, host, systemd_root  # noqa: F401
from tests.vm.ends import AFTER_ALL, ENDS, POWERED_OFF, end_all, wrong
from tests.vm.guests import clone_plan, starts

#: Init -> the fixture or the reference of its root, and what is run in place of an init.
INITS: dict[str, tuple[str, str | None]] = {
    "minimal": ("busybox_root", ""),
    "busybox": ("busybox_init_root", None),
    "systemd": ("systemd_root", None),
    "systemd of trixie": ("services:trixie", None),
}
#: How many run at once.
AT_ONCE = 4


def table(init: str) -> dict[str, str]:
    return ENDS[init.split()[0]]


@pytest.fixture(autouse=True)
def _end_guests(host: Runtime) -> Iterator[None]:  # noqa: F811
    yield
    host.end(*host.guests())


@pytest.fixture(params=INITS)
def spec(request: pytest.FixtureRequest) -> tuple[str, BootSpec]:
    """An init's name, and what is booted."""
    root, command = INITS[request.param]
    ref = root if ":" in root else request.getfixturevalue(root).ref
    return request.param, BootSpec(Reference.parse(ref), memory=256 * MIB, command=command)


Start = Callable[[list[str]], list[GuestRecord]]


def ends(host: Runtime, start: Start, commands: dict[str, str]) -> list[str]:  # noqa: F811
    """What is wrong with the ends of guests that ``start`` starts, a few at a time."""
    found, every = [], list(commands)
    for first in range(0, len(every), AT_ONCE):
        some = every[first : first + AT_ONCE]
        guests = start([f"end-{first + number}" for number in range(len(some))])
        found += wrong(end_all(host, guests, some), commands)
        host.end(*guests)
    return found


def booting(host: Runtime, spec: BootSpec) -> Start:  # noqa: F811
    made = plan_launch(host, spec)
    return _starting(host, made)


def cloning(host: Runtime, spec: BootSpec) -> Start:  # noqa: F811
    saved = asyncio.run(save_system(host, Reference("ends"), spec)).artifact
    made = clone_plan(host, saved)
    return _starting(host, made)


def _starting(host: Runtime, plan: LaunchPlan) -> Start:  # noqa: F811
    def start(names: Sequence[str]) -> list[GuestRecord]:
        return list(asyncio.run(start_many(host, starts(host, plan, *names))).guests)

    return start


def test_ends_of_booted_guests(host: Runtime, spec: tuple[str, BootSpec]) -> None:  # noqa: F811
    init, boot = spec
    assert ends(host, booting(host, boot), table(init)) == []


def test_ends_of_clones(host: Runtime, spec: tuple[str, BootSpec]) -> None:  # noqa: F811
    init, boot = spec
    assert ends(host, cloning(host, boot), table(init)) == []


@pytest.mark.parametrize("processors", [1, 2])
@pytest.mark.parametrize("cloned", [False, True])
def test_an_end_is_always_told(
    host: Runtime,  # noqa: F811
    processors: int,
    cloned: bool,
    request: pytest.FixtureRequest,
) -> None:
    """Whoever ends it is a process like the watcher: 50 times the watcher is first."""
    # The minimal init would end the machine with its command, and may be first.
    root = request.getfixturevalue("busybox_init_root").ref
    boot = BootSpec(Reference.parse(root), memory=128 * MIB, cpus=processors)
    start = cloning(host, boot) if cloned else booting(host, boot)
    for round_ in range(10):
        guests = start([f"told-{round_}-{number}" for number in range(5)])
        commands = ["poweroff -f"] * 4 + [AFTER_ALL + "poweroff -f"]
        expected = dict.fromkeys(commands, POWERED_OFF)
        assert wrong(end_all(host, guests, commands), expected) == []
        host.end(*guests)


def test_nine_clones_with_systemd_stop_at_once(
    host: Runtime,  # noqa: F811
    request: pytest.FixtureRequest,
) -> None:
    ref = request.getfixturevalue("systemd_root").ref
    start = cloning(host, BootSpec(Reference.parse(ref), memory=256 * MIB))
    guests = start([f"nine-{number}" for number in range(9)])
    assert asyncio.run(stop_guests(host, guests)) == [Stopped(Ending.SHUT_DOWN)] * 9
