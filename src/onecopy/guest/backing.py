"""What the memory of a range is made of, by its page class: a blob, or a copy that someone shares.

Copies are memory files (linux/memfd.py): their size is sealed, and the kernel drops them with the
last VMM that has them, however it ends. Not here: how QEMU is told (vmm/argv.py).
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
    """One range that is about to be mapped."""

    page_class: PageClass
    size: int
    """Bytes."""
    layer: Layer | None
    """Its stored content; None for the classes without."""
    segment: str
    """Digest of its segment's manifest."""
    number: int
    """Its place in the segment."""

    @property
    def memory_name(self) -> str:
        """What its memory file, if it is one, is called in /proc/PID/fd and maps."""
        return f"onecopy-{self.segment.removeprefix('sha256:')}.{self.number}"


def live_file(store: Store, needed: BackingRequest) -> Path:
    """What the host writes to and guests read, of an SC range; raise InsufficientResources."""
    return store.live(_blob(needed), needed.segment, needed.number, needed.size)


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

    def back(self, needed: BackingRequest) -> Backing:
        """Back a range; raise InsufficientResources (memory), NotPermitted, StoreDamaged."""
        match needed.page_class:
            case PageClass.SR:
                return self._file(needed, _blob(needed).path, linked=self._late)
            case PageClass.EW:
                # Under a name of its own: what its guest writes is found by it.
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
        """A file of the store; a VMM that runs already may only open what is linked for it."""
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
        """Open the copy of the present users, or a new one.

        Who has unloaded the segment still has the device, and so the copy, but is no user: if
        there is no other, it starts again from the saved content.
        """
        left, unloaded = None, self._host.unloaded(needed.segment)
        for guest, pid in self._host.vmms(self._host.store.users(needed.segment)):
            fd = memfd.find(pid, needed.memory_name, needed.size)
            if fd is None:
                continue
            # There is one copy: who comes after the first has the same.
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
    """Where ranges of these classes get their memory from; a VMM must have it before the end.

    ``late``: the VMM runs already. Nobody else makes or looks for a copy in common meanwhile.
    """
    async with contextlib.AsyncExitStack() as waits:
        if any(each in _COMMON for each in ranges):
            await waits.enter_async_context(locked(host.run / ".sharing.lock"))
        with ExitStack() as ends:
            yield Backings(host, ends, lease, late=late)


def _blob(needed: BackingRequest) -> Layer:
    assert needed.layer  # noqa: S101 - for the type checker: its class is a saved one
    return needed.layer
