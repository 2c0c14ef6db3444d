"""The asyncio API of a host: its guests, its store, and the guests that a program starts.

Not here: the options of starts (options.py), a running guest (guest.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Unpack

from onecopy.aio.guest import Guest
from onecopy.aio.options import (
    BootOptions,
    GuestBootOptions,
    StartOptions,
    boot_spec,
    clone_spec,
    request,
)
from onecopy.guest.lifecycle import pool_fill, save, start, stop
from onecopy.guest.lifecycle.clone_hooks import parse_hooks
from onecopy.guest.lifecycle.start import Request
from onecopy.guest.observe.accounts import report_all
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.guest.transfer.destination import StrPath
from onecopy.leaving import at_exit
from onecopy.loop import NOT_OPEN
from onecopy.model import Reference
from onecopy.sharing.report import Report
from onecopy.store import Artifact


class Host:
    """A host with its store and its guests; a context manager.

    The guests that a program starts belong to the program. They end with the block that started
    them. If the program is killed, the next onecopy command ends them. Methods raise RuntimeError
    if the host is not open.
    """

    def __init__(self, home: StrPath | None = None) -> None:
        """Prepare a host; `open` or a ``with`` block begins its use.

        Args:
            home: The store's directory; None for the directory that the commands use.
        """
        self._home = None if home is None else Path(home)
        self._stack = ExitStack()
        self._opened: tuple[Runtime, Path] | None = None

    async def open(self) -> Host:
        """Open the host without an ``async with`` block; `close` closes it.

        If the program exits without `close`, its guests end as well.

        Returns:
            This host.

        Raises:
            RuntimeError: The host is already open.
        """
        self.require_closed()
        host = await asyncio.to_thread(Runtime.open, self._home)
        self._opened = host, self._stack.enter_context(host.owner())
        self._stack.callback(at_exit(self.leave))
        return self

    async def close(self) -> None:
        """End the program's guests, and close the host; repeated calls have no effect."""
        self.leave()

    def leave(self) -> None:
        """Close the host like `close`, but from any thread and without an event loop."""
        stack, self._stack, self._opened = self._stack, ExitStack(), None
        # Without an await, so that no cancellation can interrupt it.
        stack.close()

    def require_closed(self) -> None:
        """Raise RuntimeError if the host is open."""
        if self._opened is not None:
            raise RuntimeError("this Host is open already: close() it first")

    async def __aenter__(self) -> Host:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def guests(self) -> list[Guest]:
        """Return all running guests, including those of other programs."""
        host = self._sweep()
        return [Guest(host, record) for record in host.guests()]

    def guest(self, name: str) -> Guest:
        """Return a running guest by its name.

        Raises:
            NotFound: No running guest has this name.
        """
        host = self._sweep()
        return Guest(host, host.guest(name).record())

    def ended(self) -> list[GuestRecord]:
        """Return the records of guests that ended by themselves, until `forget` removes them.

        The field ``ended`` of a record has the time and reason.
        """
        return self._sweep().ended()

    def forget(self, *names: str) -> None:
        """Remove the records and logs of guests that ended by themselves.

        Args:
            names: Names of ended guests; other names have no effect.
        """
        self._sweep().forget(*names)

    def artifacts(self, kind: str | None = None) -> list[Artifact]:
        """Return the segments, saved systems and kernels in the store.

        Args:
            kind: Only ``segment``, ``system`` or ``kernel``; None for all kinds.
        """
        return self._require_open()[0].store.artifacts(kind)

    async def report(self) -> Report:
        """Measure the memory, in bytes, of all guests and of other QEMU processes."""
        return await asyncio.to_thread(report_all, self._sweep())

    async def pool(self, system: str, size: int) -> int:
        """Keep guests of a saved system ready, so that `start` takes less time.

        The ready guests do not belong to the program: they stay when it ends.

        Args:
            system: The saved system.
            size: The number of guests to keep ready; 0 removes the pool.

        Returns:
            The number of guests that are ready.

        Raises:
            NotFound: The saved system does not exist.
            InsufficientResources: The host has no memory for so many guests.
        """
        host = self._sweep()
        found = host.store.resolve(Reference.parse(system), "system")
        return len((await pool_fill.resize(host, found, size)).ready)

    def start(
        self, system: str, count: int = 1, **options: Unpack[StartOptions]
    ) -> AbstractAsyncContextManager[list[Guest]]:
        """Start guests from a saved system, all or none; the end of the block ends them.

        Args:
            system: The saved system.
            count: The number of guests.
            options: Fields of `StartOptions`.

        Returns:
            A context manager, which starts the guests and gives them.

        Raises:
            NotFound: The saved system, or another object that an option names, does not exist.
            InvalidInput: An option is wrong.
            AlreadyExists, InUse: A name, port or disk is taken.
            InsufficientResources: The host has no memory for all guests.
            Incompatible: This host cannot start the saved system.
            GuestFailed, AgentFailed: A guest did not start.
        """
        return self._start(lambda: request(clone_spec(system, options), count, options))

    def boot(
        self, segment: str, count: int = 1, **options: Unpack[GuestBootOptions]
    ) -> AbstractAsyncContextManager[list[Guest]]:
        """Boot guests from a root segment, all or none; the end of the block ends them.

        Args:
            segment: The root segment, or a bare kernel.
            count: The number of guests.
            options: Fields of `GuestBootOptions`.

        Returns:
            A context manager, which boots the guests and gives them.

        Raises:
            NotReady: A guest was not ready within its time.
            OnecopyError: Any other error of `start`.
        """
        return self._start(lambda: request(boot_spec(segment, options), count, options))

    async def save(
        self,
        system: str,
        root: str,
        *,
        clone_hooks: Sequence[str] | None = None,
        progress: Callable[[str], None] = lambda _: None,
        **options: Unpack[BootOptions],
    ) -> save.Saved:
        """Boot a guest from a root segment, save it when it is ready, and end it.

        Args:
            system: ``NAME[:VERSION]`` of the new saved system.
            root: The root segment.
            clone_hooks: Hooks that each clone runs before it is handed out, as for `onecopy save
                --clone-hook`.
            progress: A function that gets a line of text at each step.
            options: Fields of `BootOptions`.

        Returns:
            The saved system, its sizes in bytes, and the pause of the guest in seconds.

        Raises:
            NotFound: The root segment does not exist.
            InvalidInput: An option or a hook is wrong.
            NotReady: The guest was not ready within its time.
            InsufficientResources: The host has too little memory or disk space.
        """
        spec, ref = boot_spec(root, options), Reference.parse(system)
        hooks = parse_hooks(clone_hooks)
        return await save.save_system(self._sweep(), ref, spec, progress, hooks)

    @asynccontextmanager
    async def _start(self, wanted: Callable[[], Request]) -> AsyncIterator[list[Guest]]:
        # The only asynchronous generator of a block: the end of a loop closes all that are open at
        # once, and one that closes another fails then.
        host, owner = self._sweep(), self._require_open()[1]
        group = await asyncio.to_thread(start.plan, host, wanted())
        started = await start.start(host, group, owner=owner)
        guests = [Guest(host, record) for record in started.guests]
        try:
            yield guests
            await self._sync(guests)
        finally:
            self._end(guests)

    async def _sync(self, guests: Sequence[Guest]) -> None:
        if self._opened:
            host = self._opened[0]
            await asyncio.gather(*(stop.sync_disks(host, guest.record) for guest in guests))

    def _end(self, guests: Sequence[Guest]) -> None:
        """End the guests without `keep`; it has no await, so no cancellation can interrupt it."""
        if self._opened:  # `leave` has ended them otherwise
            host, owner = self._opened
            pids = {guest.record.pid for guest in guests}
            host.end(*(record for record in host.owned(owner) if record.pid in pids))

    def _sweep(self) -> Runtime:
        """Return the host after removing the remains of guests that ended, as each command does."""
        host, _ = self._require_open()
        host.store.sweep()
        host.sweep()
        return host

    def _require_open(self) -> tuple[Runtime, Path]:
        if self._opened is None:
            raise RuntimeError(NOT_OPEN)
        return self._opened
