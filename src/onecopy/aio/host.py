"""A host, for asyncio: its guests, and those that a program starts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
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
from onecopy.guest.lifecycle.clone_hooks import checked
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
    """A host: its store, and its guests. A context manager, at whose end its guests end.

    Guests that a program starts belong to it: they end with their block, and if the program is
    killed with the next onecopy command.
    """

    def __init__(self, home: StrPath | None = None) -> None:
        """``home`` is the store's folder; default: that of the commands."""
        self._home = None if home is None else Path(home)
        self._stack = ExitStack()
        self._opened: tuple[Runtime, Path] | None = None

    async def open(self) -> Host:
        """Begin to use it, without an ``async with`` block; `close` ends that.

        A program that leaves without closing it ends its guests all the same. Raises RuntimeError
        if it is open.
        """
        self.require_closed()
        host = await asyncio.to_thread(Runtime.open, self._home)
        self._opened = host, self._stack.enter_context(host.owner())
        self._stack.callback(at_exit(self.leave))
        return self

    async def close(self) -> None:
        """End its guests; as often as you like."""
        self.leave()

    def leave(self) -> None:
        """The same, from any thread, and without an event loop."""
        stack, self._stack, self._opened = self._stack, ExitStack(), None
        # Nothing is awaited, so that nothing interrupts it.
        stack.close()

    def require_closed(self) -> None:
        """Raise RuntimeError if it is open."""
        if self._opened is not None:
            raise RuntimeError("this Host is open already: close() it first")

    async def __aenter__(self) -> Host:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def guests(self) -> list[Guest]:
        """All guests that run, also those that others have started."""
        host = self._swept()
        return [Guest(host, record) for record in host.guests()]

    def guest(self, name: str) -> Guest:
        """A running guest; raise NotFound."""
        host = self._swept()
        return Guest(host, host.guest(name).record())

    def ended(self) -> list[GuestRecord]:
        """Guests that ended by themselves, and are known until `forget`; ``ended`` says why."""
        return self._swept().ended()

    def forget(self, *names: str) -> None:
        """Remove what is known of guests that ended by themselves, their logs included."""
        self._swept().forget(*names)

    def artifacts(self, kind: str | None = None) -> list[Artifact]:
        """What is stored: every ``segment``, ``system`` and ``kernel``."""
        return self._both()[0].store.artifacts(kind)

    async def report(self) -> Report:
        """What the memory of all guests costs, and that of other QEMU processes (bytes)."""
        return await asyncio.to_thread(report_all, self._swept())

    async def pool(self, system: str, size: int) -> int:
        """Keep ``size`` guests of a saved system prepared, so that they start faster; 0 for none.

        Returns how many are ready. They are nobody's guests: they stay when the program ends.
        """
        host = self._swept()
        found = host.store.resolve(Reference.parse(system), "system")
        return len((await pool_fill.resize(host, found, size)).ready)

    @asynccontextmanager
    async def start(
        self, system: str, count: int = 1, **options: Unpack[StartOptions]
    ) -> AsyncIterator[list[Guest]]:
        """Start guests from a saved system, all or none; at the end of the block they are ended."""
        async with self._started(request(clone_spec(system, options), count, options)) as guests:
            yield guests

    @asynccontextmanager
    async def boot(
        self, segment: str, count: int = 1, **options: Unpack[GuestBootOptions]
    ) -> AsyncIterator[list[Guest]]:
        """Boot guests from a root segment; all else as `start`."""
        async with self._started(request(boot_spec(segment, options), count, options)) as guests:
            yield guests

    async def save(
        self,
        system: str,
        root: str,
        *,
        on_clone: str | None = None,
        clone_hooks: Sequence[str] | None = None,
        progress: Callable[[str], None] = lambda _: None,
        **options: Unpack[BootOptions],
    ) -> save.Saved:
        """Boot a root segment, wait until it is ready, and save it as a system.

        Each clone runs ``clone_hooks`` (as `onecopy save --clone-hook`), then ``on_clone``, a shell
        command, before it is handed out.
        """
        spec, ref, hooks = boot_spec(root, options), Reference.parse(system), checked(clone_hooks)
        return await save.save_system(
            self._swept(), ref, spec, progress, on_clone=on_clone, clone_hooks=hooks
        )

    @asynccontextmanager
    async def _started(self, wanted: Request) -> AsyncIterator[list[Guest]]:
        host, owner = self._swept(), self._both()[1]
        group = await asyncio.to_thread(start.plan, host, wanted)
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
        """End those that were not kept; nothing is awaited, so that nothing interrupts it."""
        if self._opened:  # else they have ended
            host, owner = self._opened
            pids = {guest.record.pid for guest in guests}
            host.end(*(record for record in host.owned(owner) if record.pid in pids))

    def _swept(self) -> Runtime:
        """The host without what ended since; as each command finds it."""
        host, _ = self._both()
        host.store.sweep()
        host.sweep()
        return host

    def _both(self) -> tuple[Runtime, Path]:
        if self._opened is None:
            raise RuntimeError(NOT_OPEN)
        return self._opened
