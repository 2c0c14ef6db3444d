"""A start that is cancelled at any await leaves no QEMU, run directory or lease.

Each round cancels one await later than the round before, in any task, until a start succeeds.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import subprocess
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from onecopy.errors import OnecopyError
from onecopy.guest.lifecycle.batch import start_many
from onecopy.guest.lifecycle.clone_hooks import Hooks
from onecopy.guest.lifecycle.launchplan import LaunchPlan
from onecopy.guest.lifecycle.save import save_guest
from onecopy.guest.lifecycle.start import start_one
from onecopy.guest.runtime import Runtime
from onecopy.linux import vmm_registry
from onecopy.model import Reference
from onecopy.store import Artifact
from tests.command import ONECOPY
from tests.vm.conftest import Clones
from tests.vm.conftest import vmms as qemus
from tests.vm.guests import boot_plan, clone_plan, starts
from tests.vm.kept import MEMTEST

#: When it is cancelled the QMP library leaves its socket to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
NAMES = ["a", "b", "c"]


class _Counted(Coroutine[Any, Any, Any]):
    """A coroutine whose awaits are told."""

    def __init__(self, work: Coroutine[Any, Any, Any], tell: Callable[[], None]) -> None:
        self._work, self._tell = work, tell

    def send(self, value: Any) -> Any:
        waits_for = self._work.send(value)
        self._tell()
        return waits_for

    def throw(self, *error: Any) -> Any:
        waits_for = self._work.throw(*error)
        self._tell()
        return waits_for

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        yield from self._work.__await__()


def cancelled_at(number: int, twice: int, work: Callable[[], Coroutine[Any, Any, Any]]) -> bool:
    """Run ``work``, cancelled at that await, and once more ``twice`` awaits later; whether it was.

    The awaits of all tasks count, together.
    """
    left = number

    async def main() -> None:
        loop = asyncio.get_running_loop()
        task: asyncio.Task[Any] | None = None

        def tell() -> None:
            nonlocal left
            left -= 1
            if left == 0 or (twice and left == -twice):
                assert task
                task.cancel()

        loop.set_task_factory(
            lambda loop, coro, **more: asyncio.Task(_Counted(coro, tell), loop=loop, **more)
        )
        task = loop.create_task(work())
        await task

    try:
        asyncio.run(main())
    except (asyncio.CancelledError, OnecopyError):
        assert left <= 0
    return left <= 0


def check_nothing_left(host: Runtime, what: str) -> None:
    assert qemus(host) == [], what
    assert [path.name for path in host.folders()] == [], what
    assert vmm_registry.of_store(host.run.name) == [], what
    host.store.sweep()
    assert list((host.store.root / "leases").iterdir()) == [], what
    marks = [path.name for path in host.run.iterdir() if path.name.startswith(".starting")]
    assert marks == [], what


def cancel_everywhere(
    host: Runtime, work: Callable[[], Coroutine[Any, Any, Any]], step: int
) -> int:
    """Cancel ``work`` at each ``step``-th await, every other time twice; how many times it was."""
    for round_ in itertools.count():
        number = 1 + round_ * step
        cancelled = cancelled_at(number, (0, 1, 3)[round_ % 3], work)
        if not cancelled:
            host.end(*host.guests(), *host.prepared())
            assert round_ > 3
            return round_
        # One that was cancelled when it had been handed out is the user's.
        host.end(*host.guests())
        check_nothing_left(host, f"cancelled at await {number}")
    raise AssertionError


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture
def booting(host: Runtime) -> LaunchPlan:
    """Boots a bare machine, which is up at once."""
    return boot_plan(host, str(MEMTEST))


@pytest.fixture(scope="module")
def bare(host: Runtime) -> Artifact:
    """A saved system without an agent."""
    prepared = boot_plan(host, str(MEMTEST))
    asyncio.run(start_one(host, prepared, "bare"))
    saved = asyncio.run(save_guest(host, Reference("bare"), "bare")).artifact
    host.end(*host.guests())
    return saved


def test_a_boot(host: Runtime, booting: LaunchPlan) -> None:
    cancel_everywhere(host, lambda: start_many(host, starts(host, booting, "a")), 1)


def test_a_clone(host: Runtime, bare: Artifact) -> None:
    source = clone_plan(host, bare)

    cancel_everywhere(host, lambda: start_many(host, starts(host, source, "a")), 1)


def test_one_without_a_batch(host: Runtime, bare: Artifact) -> None:
    source = clone_plan(host, bare)
    cancel_everywhere(host, lambda: start_one(host, source, "a"), 2)


def test_a_prepared_one(host: Runtime, bare: Artifact) -> None:
    source = replace(clone_plan(host, bare), standby=True)

    cancel_everywhere(host, lambda: start_many(host, starts(host, source, "pool.a")), 2)


def test_a_batch(host: Runtime, bare: Artifact) -> None:
    source = clone_plan(host, bare)

    cancel_everywhere(host, lambda: start_many(host, starts(host, source, *NAMES)), 7)


def test_a_clone_that_becomes_itself(host: Runtime, saved: Artifact) -> None:
    source = clone_plan(host, saved)

    cancel_everywhere(host, lambda: start_many(host, starts(host, source, *NAMES[:2])), 3)


def test_several_that_fail_to_become_themselves(
    host: Runtime, saved: Artifact, clones: Clones
) -> None:
    """The first failure cancels the others, of which some are about to fail, too."""
    (guest,) = clones(1)
    script = "case $(hostname) in *-[13]) exit 1 ;; esac"
    asyncio.run(save_guest(host, Reference("picky"), guest.name, hooks=Hooks(command=script)))
    host.end(guest)
    argv = [ONECOPY, "run", "-n", "4", "--name", "picky", "picky"]
    for _ in range(3):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
        assert done.returncode and "Traceback" not in done.stderr, done.stderr
        check_nothing_left(host, done.stderr)
