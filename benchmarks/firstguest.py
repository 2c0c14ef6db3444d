"""Measures the start of a host's first guest, with its files in the page cache or not.

The blobs that a guest maps or boots from are dropped before each start. Preloading is measured
separately. Not here: preloading itself (onecopy.guest.pagecache.preload).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.counts import page_faults, read_bytes
from benchmarks.figures import Spread, evict
from benchmarks.kinds import new_name
from benchmarks.setup import Setup
from onecopy.guest.lifecycle.start import start_one
from onecopy.guest.pagecache import access_record, preload
from onecopy.linux import prefetch
from onecopy.linux.prefetch import Extent
from onecopy.store import Layer

_DROP = Path("/proc/sys/vm/drop_caches")
#: Way -> its name in the table.
WAYS = {
    "cold": "dropped, nothing recorded",
    "start": "dropped, recorded: the start itself begins to read",
    "recorded": "dropped, then `preload` with a record",
    "whole": "dropped, then `preload --whole`",
    "memory": "not dropped",
}


@dataclass(frozen=True, slots=True)
class FirstGuest:
    """The figures of one way, from several starts."""

    seconds: Spread
    """Seconds from the request until the application answers."""
    warming: Spread
    """Seconds that `preload` took before the start."""
    read: Spread
    """Bytes that the kernel read from storage for the VMM (/proc/PID/io, read_bytes)."""
    waits: Spread
    """Major page faults of the VMM, each a wait for storage (/proc/PID/stat)."""
    ahead: Spread
    """Bytes that preloading read, before or during the start."""


@dataclass(frozen=True, slots=True)
class FirstGuests:
    """The figures of all ways, and the sizes of blobs and records."""

    ways: dict[str, FirstGuest]
    dropped: str
    blobs: int
    """Bytes of all blobs."""
    recorded: int
    """Recorded bytes of the blobs."""
    read_ahead: int | None
    """Read-ahead of the store's disk in bytes."""


async def measure_first_guests(
    setup: Setup, count: int, drop_caches: bool, tell: Callable[[str], None]
) -> FirstGuests:
    """Measure ``count`` starts of each way, in turn."""
    lines: dict[str, list[tuple[float, ...]]] = {way: [] for way in WAYS}
    with _no_records(setup):
        # The first start writes the record.
        _drop(setup, drop_caches)
        await _start(setup)
        for artifact in setup.prepared.artifacts:
            preload.record(setup.host.store, artifact)
        known = [
            (each, access_record.read(setup.host.store, each) or []) for each in _layers(setup)
        ]
        for number in range(count):
            for way in WAYS:
                tell(f"first guest, {WAYS[way]}: {number + 1} of {count}")
                if way != "memory":
                    _drop(setup, drop_caches)
                lines[way].append(await _one(setup, way, known))
    return FirstGuests(
        ways={way: _first_guest(each) for way, each in lines.items()},
        dropped=_DROP.as_posix() if drop_caches else "posix_fadvise(2) on the blobs",
        blobs=sum(layer.blob_size for layer, _ in known),
        recorded=sum(size for _, extents in known for _, size in extents),
        read_ahead=prefetch.read_ahead(setup.host.store.root),
    )


def _first_guest(lines: list[tuple[float, ...]]) -> FirstGuest:
    return FirstGuest(*(Spread.of(figures) for figures in zip(*lines, strict=True)))


async def _one(
    setup: Setup, way: str, known: list[tuple[Layer, list[Extent]]]
) -> tuple[float, ...]:
    store = setup.host.store
    for layer, extents in known:
        if way in ("start", "recorded"):
            access_record.write(store, layer, extents)
        else:
            access_record.forget(store, layer)
    before, began = read_bytes(os.getpid()), time.monotonic()
    if way in ("recorded", "whole"):
        for artifact in setup.prepared.artifacts:
            preload.warm(store, artifact, whole=way == "whole")
    took = time.monotonic() - began
    seconds, read, waits = await _start(setup)
    return seconds, took, read, waits, read_bytes(os.getpid()) - before


async def _start(setup: Setup) -> tuple[float, float, float]:
    """Return the seconds of a start, the bytes read for its VMM, and its major faults."""
    record = await start_one(setup.host, setup.prepared, new_name())
    try:
        return record.start_seconds, read_bytes(record.pid), page_faults(record.pid)[1]
    finally:
        setup.host.end(record)


@contextmanager
def _no_records(setup: Setup) -> Iterator[None]:
    """Restore the user's records at the end."""
    store = setup.host.store
    before = [(layer, access_record.read(store, layer)) for layer in _layers(setup)]
    try:
        for layer, _ in before:
            access_record.forget(store, layer)
        yield
    finally:
        for layer, extents in before:
            if extents is None:
                access_record.forget(store, layer)
            else:
                access_record.write(store, layer, extents)


def _layers(setup: Setup) -> list[Layer]:
    found = [layer for artifact in setup.prepared.artifacts for layer in artifact.layers]
    return list({layer.digest: layer for layer in found}.values())


def _drop(setup: Setup, everything: bool) -> None:
    evict(layer.path for layer in _layers(setup))
    if everything:
        _DROP.write_text("1")
