"""Starts the guests of a test through `onecopy.Host`, as a program would."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import onecopy
from onecopy.guest.lifecycle.launchplan import BootSpec, CloneSpec, LaunchPlan
from onecopy.guest.lifecycle.save import Saved
from onecopy.guest.lifecycle.start import plan_launch, start_one
from onecopy.guest.run_directory import Batch, GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.images.range_record import SegmentConfig
from onecopy.model import Reference
from onecopy.store import Artifact


class Guests:
    """Boots and clones guests on ``host``; they end with the test (the fixture ``guests``).

    Options are those of `onecopy.Host.boot` and `onecopy.Host.start`. Not admission: a test says
    itself how much memory its guests need.
    """

    def __init__(self, host: onecopy.Host) -> None:
        self.host = host
        self._running = ExitStack()
        self._names: list[str] = []

    def boot(self, root: Artifact | str, **options: Any) -> onecopy.Guest:
        """Boot one guest from a root segment; one that has no init just stays up."""
        if isinstance(root, Artifact):
            if root.kind == "segment" and not SegmentConfig.of(root).init:
                options = {"command": "", **options}
            root = root.ref
        (guest,) = self._started(self.host.boot(root, **{"overcommit": True, **options}))
        return guest

    def clone(self, system: Artifact | str, count: int = 1, **options: Any) -> list[onecopy.Guest]:
        """Start ``count`` clones of a saved system."""
        ref = system.ref if isinstance(system, Artifact) else system
        return self._started(self.host.start(ref, count, **{"overcommit": True, **options}))

    def save(self, guest: GuestRecord, system: Reference | str, **options: Any) -> Saved:
        """Save a running guest as a system; it goes on. Options are `onecopy.Guest.save`'s."""
        return self.host.guest(guest.name).save(str(system), **options)

    def _started(self, start: AbstractContextManager[list[onecopy.Guest]]) -> list[onecopy.Guest]:
        guests = self._running.enter_context(start)
        self._names += [guest.name for guest in guests]
        return guests

    def end(self) -> None:
        """End them, and forget those that a test let end by themselves."""
        self._running.close()
        self.host.forget(*self._names)


@contextmanager
def open_guests() -> Iterator[Guests]:
    """Open the store of ``$ONECOPY_HOME``; what is started on it ends with the block."""
    with onecopy.Host() as host:
        guests = Guests(host)
        try:
            yield guests
        finally:
            guests.end()


def save_system(name: str, root: Artifact | str, **options: Any) -> Artifact:
    """Boot a root segment and save it as a system. Options are `onecopy.Host.save`'s."""
    with onecopy.Host() as host:
        return host.save(name, root.ref if isinstance(root, Artifact) else root, **options).artifact


def boot_plan(host: Runtime, root: str, **fields: Any) -> LaunchPlan:
    """The plan of guests that boot a root segment, for tests of how a plan is carried out."""
    return plan_launch(host, BootSpec(root=Reference.parse(root), **fields))


def starts(
    host: Runtime, plan: LaunchPlan, *names: str
) -> dict[str, Callable[[Batch], Awaitable[GuestRecord]]]:
    """What batch.start_many starts: guests of one plan with these names."""
    return {name: partial(start_one, host, plan, name) for name in names}


def clone_plan(host: Runtime, system: Artifact, **fields: Any) -> LaunchPlan:
    """The same of clones of a saved system."""
    return plan_launch(host, CloneSpec(system=Reference.parse(system.ref), **fields))
