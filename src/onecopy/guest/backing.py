"""Finds or makes the file that backs a range in a guest, by the range's page class.

The backing is a blob, or a copy of it in a memory file (linux/memfd.py). A memory file has a sealed
size, and the kernel frees it with the last VMM that has it open. Not here: QEMU's arguments
(vmm/argv.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack
from pathlib import Path

import msgspec

from onecopy.guest.runtime import Runtime
from onecopy.linux import memfd
from onecopy.linux.lock import locked
from onecopy.model import PageClass
from onecopy.store import Layer, Lease, Store
from onecopy.vmm.argv import MapMode, Slot

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


class BackingRequest(msgspec.Struct, frozen=True):
    """A range that is about to be mapped."""

    page_class: PageClass
    size: int
    """Bytes."""
    layer: Layer | None
    """The stored content; None for classes without it."""
    segment: str
    """Digest of the segment's manifest."""
    number: int
    """Index of the range in its segment."""

    @property
    def memory_name(self) -> str:
        """The name of the range's memory file in /proc/PID/fd and maps."""
        return f"onecopy-{self.segment.removeprefix('sha256:')}.{self.number}"


def live_file(store: Store, needed: BackingRequest) -> Path:
    """Return the file of an SC range, which the host writes and guests read.

    Raises:
        InsufficientResources: The disk has no room for it.
    """
    return store.live(_blob(needed), needed.segment, needed.number, needed.size)


def map_mode(page_class: PageClass) -> MapMode:
    """Return how QEMU maps a range of that class."""
    return _MODES[page_class]


class Backing(msgspec.Struct, frozen=True):
    """The backing of a range."""

    slot: Slot
    mapped: str
    """The path in the VMM's /proc/PID/maps."""
    file: str
    """The file of the store whose pages the range shares until it is written; "" for none."""


class Backings:
    """The backings of a guest's ranges."""

    def __init__(self, host: Runtime, ends: ExitStack, lease: Lease | None, *, late: bool) -> None:
        self._host = host
        self._ends = ends
        self._lease = lease
        self._late = late

    def back(self, needed: BackingRequest) -> Backing:
        """Find or make the backing of a range.

        Raises:
            InsufficientResources: There is too little memory for a copy.
            NotPermitted, StoreDamaged: The blob cannot be used.
        """
        match needed.page_class:
            case PageClass.SR:
                return self._file(needed, _blob(needed).path, linked=self._late)
            case PageClass.EW:
                # Accounting finds the pages that the guest writes by this separate name.
                return self._file(needed, _blob(needed).path, linked=True)
            case PageClass.SC:
                return self._file(needed, live_file(self._host.store, needed), linked=self._late)
            case PageClass.SW | PageClass.SN:
                return self._memory(needed, needed.memory_name, self.common(needed))
            case PageClass.ER | PageClass.EN:
                name = f"{needed.memory_name}.{self._holder.record.holder}"
                sealed = needed.page_class is PageClass.ER
                return self._memory(needed, name, _copy(needed, name, sealed=sealed))

    @property
    def _holder(self) -> Lease:
        assert self._lease  # noqa: S101 - for the type checker: who maps something has one
        return self._lease

    def _file(self, needed: BackingRequest, path: Path, *, linked: bool) -> Backing:
        """Back a range by a file of the store; a running VMM can only open files linked for it."""
        mapped = path
        if linked:
            mapped = self._holder.files / needed.memory_name
            mapped.unlink(missing_ok=True)
            mapped.hardlink_to(path)
        return Backing(_slot(needed, mapped), str(mapped), str(path))

    def _memory(self, needed: BackingRequest, name: str, fd: int) -> Backing:
        self._ends.callback(os.close, fd)
        return Backing(_slot(needed, Path(f"/proc/self/fd/{fd}")), f"/memfd:{name}", "")

    def common(self, needed: BackingRequest) -> int:
        """Open the copy that the segment's users share, or make a new one.

        A guest that has unloaded the segment may still hold the device, and with it the copy. If no
        other guest uses the copy, its content is reset to the saved one.

        Returns:
            A descriptor that the caller closes.
        """
        left, unloaded = None, self._host.unloaded(needed.segment)
        for guest, pid in self._host.vmms(self._host.store.users(needed.segment)):
            fd = memfd.find(pid, needed.memory_name, needed.size)
            if fd is None:
                continue
            # All guests hold the same copy.
            if left is not None:
                os.close(left)
            if guest not in unloaded:
                return fd
            left = fd
        if left is None:
            return _copy(needed, needed.memory_name)
        memfd.fill(left, needed.layer.path if needed.layer else None)
        return left


def _slot(needed: BackingRequest, path: Path) -> Slot:
    return Slot(path, needed.size, map_mode(needed.page_class))


def _copy(needed: BackingRequest, name: str, *, sealed: bool = False) -> int:
    content = needed.layer.path if needed.layer else None
    return memfd.create(name, needed.size, content, sealed=sealed)


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


def _blob(needed: BackingRequest) -> Layer:
    assert needed.layer  # noqa: S101 - for the type checker: its class is a saved one
    return needed.layer
