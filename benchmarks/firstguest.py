"""What the first guest of a host waits for: its start with its files in memory, or not.

Each start follows on dropping the blobs that the guest maps or is booted from. Warming comes before
the start, and is told apart. Not here: what is warmed how (onecopy.guest.pagecache.preload).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Spread, evict
from benchmarks.kinds import new_name
from benchmarks.setup import Setup
from onecopy.guest.lifecycle.start import start_one
from onecopy.guest.pagecache import access_record, preload
from onecopy.linux import prefetch
from onecopy.linux.files import read_of_process
from onecopy.linux.prefetch import Extent
from onecopy.store import Layer

_DROP = Path("/proc/sys/vm/drop_caches")
#: Way -> what it is called in the table.
WAYS = {
    "cold": "dropped, nothing recorded",
    "start": "dropped, recorded: the start itself begins to read",
    "recorded": "dropped, then `preload` with a record",
    "whole": "dropped, then `preload --whole`",
    "memory": "not dropped",
}


@dataclass(frozen=True, slots=True)
class FirstGuest:
    """One way, several times."""

    seconds: Spread
    """From asking for the guest until it is ready (its application answers)."""
    warming: Spread
    """Seconds that `preload` took before."""
    read: Spread
    """Bytes that the VMM had the kernel read from storage (/proc/PID/io, read_bytes)."""
    waits: Spread
    """Major page faults of the VMM: how often it had to wait for storage (/proc/PID/stat)."""
    ahead: Spread
    """Bytes read by what warms, before the start or in it."""


@dataclass(frozen=True, slots=True)
class FirstGuests:
    """All ways in turn, and what was dropped and recorded."""

    ways: dict[str, FirstGuest]
    dropped: str
    blobs: int
    """Bytes of all blobs."""
    recorded: int
    """Bytes of them that are on record."""
    read_ahead: int | None
    """Bytes that the kernel reads ahead on the store's disk."""


async def measure_first_guests(
    setup: Setup, count: int, drop_caches: bool, tell: Callable[[str], None]
) -> FirstGuests:
    """``count`` starts of each way, in turn."""
    lines: dict[str, list[tuple[float, ...]]] = {way: [] for way in WAYS}
    with _no_records(setup):
        # The first one of all writes the record.
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
    before, began = _read_bytes(os.getpid()), time.monotonic()
    if way in ("recorded", "whole"):
        for artifact in setup.prepared.artifacts:
            preload.warm(store, artifact, whole=way == "whole")
    took = time.monotonic() - began
    seconds, read, waits = await _start(setup)
    return seconds, took, read, waits, _read_bytes(os.getpid()) - before


async def _start(setup: Setup) -> tuple[float, float, float]:
    """Seconds of a start, bytes that its VMM had read, and its major faults."""
    record = await start_one(setup.host, setup.prepared, new_name())
    try:
        return record.start_seconds, _read_bytes(record.pid), _major_faults(record.pid)
    finally:
        setup.host.end(record)


@contextmanager
def _no_records(setup: Setup) -> Iterator[None]:
    """Put the user's own records back at the end."""
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


def _read_bytes(pid: int) -> int:
    found = re.search(rb"^read_bytes: (\d+)$", read_of_process(pid, "io") or b"", re.MULTILINE)
    if not found:
        raise RuntimeError("this kernel has no /proc/PID/io")
    return int(found[1])


def _major_faults(pid: int) -> int:
    text = read_of_process(pid, "stat") or b""
    # The 12th field; the second may hold blanks (proc_pid_stat(5)).
    return int(text[text.rindex(b")") + 2 :].split()[9])
