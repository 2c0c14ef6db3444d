"""What the memory of a range is made of, by its page class: a blob, or a copy that someone shares.

Copies are memory files (linux/memfd.py): their size is sealed, and the kernel drops them with the
last VMM that has them, however it ends. What a guest has of a segment is put on record here, too.
Not here: how QEMU is told (vmm/argv.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

import msgspec

from onecopy.guest.machine import Placed
from onecopy.guest.run_directory import Attached, Device
from onecopy.guest.runtime import Runtime
from onecopy.linux import memfd
from onecopy.linux.lock import locked
from onecopy.model import PageClass
from onecopy.store import Layer, Lease, Store
from onecopy.vmm.argv import FIRST_SEGMENT_SLOT, MapMode, Slot

_MODES = {
    PageClass.SR: MapMode.READ_ONLY,
    PageClass.ER: MapMode.READ_ONLY,
    PageClass.SC: MapMode.READ_ONLY,
    PageClass.SW: MapMode.SHARED,
    PageClass.SN: MapMode.SHARED,
    PageClass.EN: MapMode.SHARED,
    PageClass.EW: MapMode.COPY_ON_WRITE,
}
_COMMON = (PageClass.SW, PageClass.SN)


def live_file(store: Store, placed: Placed) -> Path:
    """What the host writes to and guests read, of an SC range; raise InsufficientResources."""
    item = placed.segment
    return store.live(_blob(placed), item.segment, item.number, item.size)


def map_mode(page_class: PageClass) -> MapMode:
    """How QEMU maps a range of that class."""
    return _MODES[page_class]


class Backing(msgspec.Struct, frozen=True):
    """What one range is mapped from."""

    slot: Slot
    mapped: str
    """As the VMM's /proc/PID/maps has it."""
    file: str
    """The file of the store whose pages it shows, at least until it is written to; "" if none."""


class Backings:
    """Makes and finds what ranges are mapped from."""

    def __init__(self, host: Runtime, ends: ExitStack, lease: Lease | None, *, late: bool) -> None:
        self._host = host
        self._ends = ends
        self._lease = lease
        self._late = late

    def back(self, placed: Placed) -> Backing:
        """Back a range; raise InsufficientResources (memory), NotPermitted, StoreDamaged."""
        match placed.segment.page_class:
            case PageClass.SR:
                return self._file(placed, _blob(placed).path, linked=self._late)
            case PageClass.EW:
                # Under a name of its own: what its guest writes is found by it.
                return self._file(placed, _blob(placed).path, linked=True)
            case PageClass.SC:
                return self._file(placed, live_file(self._host.store, placed), linked=self._late)
            case PageClass.SW | PageClass.SN:
                return self._memory(placed, placed.segment.memory_name, self.common(placed))
            case PageClass.ER | PageClass.EN:
                name = f"{placed.segment.memory_name}.{self._holder.record.holder}"
                sealed = placed.segment.page_class is PageClass.ER
                return self._memory(placed, name, _copy(placed, name, sealed=sealed))

    @property
    def _holder(self) -> Lease:
        assert self._lease  # noqa: S101 - for the type checker: who maps something has one
        return self._lease

    def _file(self, placed: Placed, path: Path, *, linked: bool) -> Backing:
        """A file of the store; a VMM that runs already may only open what is linked for it."""
        mapped = path
        if linked:
            mapped = self._holder.files / placed.segment.memory_name
            mapped.unlink(missing_ok=True)
            mapped.hardlink_to(path)
        return Backing(_slot(placed, mapped), str(mapped), str(path))

    def _memory(self, placed: Placed, name: str, fd: int) -> Backing:
        self._ends.callback(os.close, fd)
        return Backing(_slot(placed, Path(f"/proc/self/fd/{fd}")), f"/memfd:{name}", "")

    def common(self, placed: Placed) -> int:
        """Open the copy of the present users, or a new one.

        Who has unloaded the segment still has the device, and so the copy, but is no user: if
        there is no other, it starts again from the saved content.
        """
        left, unloaded = None, self._host.unloaded(placed.segment.segment)
        for guest, pid in self._host.vmms(self._host.store.users(placed.segment.segment)):
            fd = memfd.find(pid, placed.segment.memory_name, placed.segment.size)
            if fd is None:
                continue
            # There is one copy: who comes after the first has the same.
            if left is not None:
                os.close(left)
            if guest not in unloaded:
                return fd
            left = fd
        if left is None:
            return _copy(placed, placed.segment.memory_name)
        memfd.fill(left, placed.layer.path if placed.layer else None)
        return left


def _slot(placed: Placed, path: Path) -> Slot:
    return Slot(path, placed.segment.size, map_mode(placed.segment.page_class))


def _copy(placed: Placed, name: str, *, sealed: bool = False) -> int:
    content = placed.layer.path if placed.layer else None
    return memfd.create(name, placed.segment.size, content, sealed=sealed)


@contextlib.asynccontextmanager
async def backings(
    host: Runtime, ranges: Iterable[PageClass], lease: Lease | None, *, late: bool = False
) -> AsyncIterator[Backings]:
    """Where ranges of these classes get their memory from; a VMM must have it before the end.

    ``late``: the VMM runs already. Nobody else makes or looks for a copy in common meanwhile.
    """
    async with contextlib.AsyncExitStack() as waits:
        if any(each in _COMMON for each in ranges):
            await waits.enter_async_context(locked(host.run / ".sharing.lock"))
        with ExitStack() as ends:
            yield Backings(host, ends, lease, late=late)


def _blob(placed: Placed) -> Layer:
    assert placed.layer  # noqa: S101 - for the type checker: its class is a saved one
    return placed.layer


def display_slots(placed: Sequence[Placed]) -> tuple[Slot, ...]:
    """The memory of segments as a command line shows it that is not run."""
    return tuple(
        Slot(
            item.layer.path if item.layer else Path(f"/proc/self/fd/{item.segment.memory_name}"),
            item.segment.size,
            map_mode(item.segment.page_class),
        )
        for item in placed
    )


def loaded(placed: Sequence[Placed], backed: Sequence[Backing]) -> tuple[Attached, ...]:
    """The record of the segments that a guest starts with; ranges of one lie side by side."""
    numbered = enumerate(zip(placed, backed, strict=True), start=FIRST_SEGMENT_SLOT)
    return tuple(
        attached(
            [(item, each, f"00:{number:02x}") for number, (item, each) in ranges], state="loaded"
        )
        for _, ranges in groupby(numbered, key=lambda each: each[1][0].segment.ref)
    )


def attached(
    ranges: Sequence[tuple[Placed, Backing, str]], *, state: str, exclusive: bool = False
) -> Attached:
    """The record of a segment in a guest: its ranges, their memory and their PCI addresses."""
    first = ranges[0][0].segment
    return Attached(
        name=first.name,
        ref=first.ref,
        digest=first.segment,
        devices=tuple(_device(*each) for each in ranges),
        mountpoint=first.mountpoint,
        state=state,
        exclusive=exclusive,
    )


def _device(placed: Placed, backed: Backing, address: str) -> Device:
    item = placed.segment
    return Device(item.page_class, item.size, item.fs, address, backed.mapped, backed.file)
