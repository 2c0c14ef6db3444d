"""A host, for asyncio: its guests, and those that a program starts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Unpack

from msgspec.structs import replace

from onecopy.aio.guest import Guest
from onecopy.aio.options import BootOptions, boot_spec, choice, mergeable
from onecopy.guest.lifecycle import admission, batch, boot, bootplan, pool, restore, save, stop
from onecopy.guest.lifecycle.clone_hooks import checked
from onecopy.guest.lifecycle.disks import DiskSpec, check_disks
from onecopy.guest.lifecycle.resources import ExtraResources, added_memory
from onecopy.guest.observe.accounts import report_all
from onecopy.guest.ports import Ports, numbered
from onecopy.guest.run_directory import Batch, GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.guest.transfer.destination import StrPath
from onecopy.leaving import at_exit
from onecopy.loop import NOT_OPEN
from onecopy.model import Reference, check_ports, parse_mount, parse_size
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
        return len((await pool.resize(host, found, size)).ready)

    @asynccontextmanager
    async def start(
        self,
        system: str,
        count: int = 1,
        *,
        name: str | None = None,
        publish: Iterable[tuple[int, int]] = (),
        bridge: str = "",
        allow_host: bool = False,
        accel: str = "auto",
        ksm: str = "ram",
        memory: int | str | None = None,
        cpus: int | None = None,
        segments: Sequence[str] = (),
        disks: Sequence[str] = (),
        overcommit: bool = False,
    ) -> AsyncIterator[list[Guest]]:
        """Guests from a saved system, all or none; at the end of the block they are ended.

        ``publish`` are (port of 127.0.0.1, port of the guest) pairs. The host's ports count up from
        guest to guest; 0 is any free one, which `Guest.port` tells. With ``bridge`` they are ports
        of this bridge of the host's. Guests reach the outside only; with ``allow_host`` also what
        listens on the host (127.0.0.1 is their 198.18.0.2). ``memory`` and ``cpus`` are more than
        was saved, ``segments`` further ones, ``disks`` as `onecopy run --disk` has them; they are
        synced at the end of the block, unless it ends by an exception. ``ksm`` is what KSM may
        merge: ``none``, ``ram`` or ``all``, QEMU's own memory included. With ``overcommit`` the
        host need not have the memory for all.
        """
        host, specs = self._swept(), _disks(disks, name, count)
        fitting = ExtraResources(
            memory=None if memory is None else parse_size(str(memory)),
            cpus=cpus,
            segments=tuple(parse_mount(each) for each in segments),
            disks=specs,
        )
        found = host.store.resolve(Reference.parse(system), "system")
        source = await asyncio.to_thread(restore.template, host, found, choice(accel))
        added = added_memory(fitting, source.config)
        need = admission.of_clones(source.accel.name, count, added)

        def one(name: str, ports: Ports, batch: Batch) -> Awaitable[GuestRecord]:
            spec = restore.CloneSpec(
                ports, bridge, mergeable(ksm), fitting, allow_host, need.translated
            )
            return restore.start_clone(host, source, name, spec, batch)

        names = batch.names_for(found.name, name, count)
        guests = await self._begin(names, publish, 0 if overcommit else need.each, one)
        try:
            yield guests
            await self._sync(guests)
        finally:
            self._end(guests)

    @asynccontextmanager
    async def boot(
        self,
        segment: str,
        count: int = 1,
        *,
        name: str | None = None,
        publish: Iterable[tuple[int, int]] = (),
        bridge: str = "",
        ksm: str = "ram",
        disks: Sequence[str] = (),
        overcommit: bool = False,
        **options: Unpack[BootOptions],
    ) -> AsyncIterator[list[Guest]]:
        """Guests that boot a root segment; all else as `start`."""
        host, spec = self._swept(), boot_spec(segment, options)
        spec = replace(spec, bridge=bridge, ksm=mergeable(ksm), disks=_disks(disks, name, count))
        prepared = await asyncio.to_thread(bootplan.plan_boot, host, spec)
        need = admission.of_cold(prepared.accel.name, prepared.hardware.memory, count)
        spec = replace(spec, translated=need.translated)

        def one(name: str, ports: Ports, batch: Batch) -> Awaitable[GuestRecord]:
            mine = replace(prepared, spec=replace(spec, publish=ports))
            return boot.boot_guest(host, mine, name, batch)

        names = batch.names_for(prepared.root.name, name, count)
        guests = await self._begin(names, publish, 0 if overcommit else need.each, one)
        try:
            yield guests
            await self._sync(guests)
        finally:
            self._end(guests)

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

    async def _begin(
        self,
        names: Sequence[str],
        publish: Iterable[tuple[int, int]],
        each: int,
        one: Callable[[str, Ports, Batch], Awaitable[GuestRecord]],
    ) -> list[Guest]:
        host, owner = self._both()
        pairs = tuple(check_ports(*pair) for pair in publish)
        ports = {guest: numbered(pairs, number) for number, guest in enumerate(names)}
        started = await batch.start_many(
            host,
            names,
            lambda guest, batch: one(guest, ports[guest], batch),
            owner=owner,
            each=each,
        )
        pool.refill(host)
        return [Guest(host, record) for record in started.guests]

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


def _disks(texts: Sequence[str], name: str | None, count: int) -> tuple[DiskSpec, ...]:
    specs = tuple(DiskSpec.parse(each) for each in texts)
    check_disks(specs, named=name is not None, count=count)
    return specs
