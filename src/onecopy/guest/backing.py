"""Finds or makes the file that backs a range in a guest, by the range's page class.

The backing is a blob, or a copy of it in a memory file (linux/memfd.py). A memory file has a sealed
size, and the kernel frees it with the last VMM that has it open. The record of a guest's segment is
made here, too. Not here: QEMU's arguments (vmm/argv.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

from onecopy.guest.machine import Placed
from onecopy.guest.run_directory import Attached, Device
from onecopy.guest.runtime import Runtime
from onecopy.linux import memfd
from onecopy.linux.lock import locked
from onecopy.model import PageClass
from onecopy.store import Layer, Lease, Store
from onecopy.vmm.argv import FIRST_SEGMENT_SLOT, Backing, MapMode

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
    """Return the file of an SC range, which the host writes and guests read.

    Raises:
        InsufficientResources: The disk has no room for it.
    """
    item = placed.segment
    return store.live(_blob(placed), item.segment, item.number, item.size)


def map_mode(page_class: PageClass) -> MapMode:
    """Return how QEMU maps a range of that class."""
    return _MODES[page_class]


class Backings:
    """The backings of a guest's ranges."""

    def __init__(self, host: Runtime, ends: ExitStack, lease: Lease | None, *, late: bool) -> None:
        self._host = host
        self._ends = ends
        self._lease = lease
        self._late = late

    def back(self, placed: Placed) -> Backing:
        """Find or make the backing of a range.

        Raises:
            InsufficientResources: There is too little memory for a copy.
            NotPermitted, StoreDamaged: The blob cannot be used.
        """
        match placed.segment.page_class:
            case PageClass.SR:
                return self._file(placed, _blob(placed).path, linked=self._late)
            case PageClass.EW:
                # Accounting finds the pages that the guest writes by this separate name.
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
        """Back a range by a file of the store; a running VMM can only open files linked for it."""
        mapped = path
        if linked:
            mapped = self._holder.files / placed.segment.memory_name
            mapped.unlink(missing_ok=True)
            mapped.hardlink_to(path)
        return _backing(placed, mapped, str(mapped), str(path))

    def _memory(self, placed: Placed, name: str, fd: int) -> Backing:
        self._ends.callback(os.close, fd)
        return _backing(placed, Path(f"/proc/self/fd/{fd}"), f"/memfd:{name}")

    def common(self, placed: Placed) -> int:
        """Open the copy that the segment's users share, or make a new one.

        A guest that has unloaded the segment may still hold the device, and with it the copy. If no
        other guest uses the copy, its content is reset to the saved one.

        Returns:
            A descriptor that the caller closes.
        """
        left, unloaded = None, self._host.unloaded(placed.segment.segment)
        for guest, pid in self._host.vmms(self._host.store.users(placed.segment.segment)):
            fd = memfd.find(pid, placed.segment.memory_name, placed.segment.size)
            if fd is None:
                continue
            # All guests hold the same copy.
            if left is not None:
                os.close(left)
            if guest not in unloaded:
                return fd
            left = fd
        if left is None:
            return _copy(placed, placed.segment.memory_name)
        memfd.fill(left, placed.layer.path if placed.layer else None)
        return left


def _backing(placed: Placed, path: Path, mapped: str = "", file: str = "") -> Backing:
    item = placed.segment
    return Backing(path, item.size, map_mode(item.page_class), mapped, file)


def _copy(placed: Placed, name: str, *, sealed: bool = False) -> int:
    content = placed.layer.path if placed.layer else None
    return memfd.create(name, placed.segment.size, content, sealed=sealed)


@contextlib.asynccontextmanager
async def backings(
    host: Runtime, ranges: Iterable[PageClass], lease: Lease | None, *, late: bool = False
) -> AsyncIterator[Backings]:
    """Yield the backings for ranges of these classes.

    The VMM must have opened the files before the block ends. Within the block no other process
    makes or looks for a common copy.

    Args:
        host: The runtime of the guest.
        ranges: The classes of the ranges.
        lease: The guest's lease.
        late: Whether the VMM is running already.
    """
    async with contextlib.AsyncExitStack() as waits:
        if any(each in _COMMON for each in ranges):
            await waits.enter_async_context(locked(host.run / ".sharing.lock"))
        with ExitStack() as ends:
            yield Backings(host, ends, lease, late=late)


def _blob(placed: Placed) -> Layer:
    assert placed.layer  # noqa: S101 - for the type checker: its class is a saved one
    return placed.layer


def displayed(placed: Sequence[Placed]) -> tuple[Backing, ...]:
    """Return placeholder backings for a dry run's command line."""
    return tuple(
        _backing(
            item,
            item.layer.path if item.layer else Path(f"/proc/self/fd/{item.segment.memory_name}"),
        )
        for item in placed
    )


def loaded(placed: Sequence[Placed], backed: Sequence[Backing]) -> tuple[Attached, ...]:
    """Return the records of the segments that a guest starts with; a segment's ranges adjoin."""
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
    """Return the record of a segment in a guest: its ranges, their backings and PCI addresses."""
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
