"""Writes to the SC ranges of segments, which guests read live: `onecopy write`."""

from __future__ import annotations

from collections.abc import Iterable

from onecopy.errors import InvalidInput
from onecopy.guest.backing import live_file
from onecopy.guest.machine import Placed, ranges_of
from onecopy.images.range_record import SegmentConfig
from onecopy.linux.files import write_at
from onecopy.linux.lock import flock
from onecopy.model import PageClass, Reference
from onecopy.store import Store
from onecopy.store.disk import file_errors


def write(
    store: Store,
    ref: Reference,
    data: Iterable[bytes],
    *,
    offset: int = 0,
    number: int | None = None,
) -> int:
    """Write to an SC range of a segment; all guests see the data at once.

    The data stays until the segment is removed. Writers exclude each other. A guest that reads
    during a write may see part of it.

    Args:
        store: The store of the segment.
        ref: The segment.
        data: The chunks to write.
        offset: Where to start, in bytes from the start of the range.
        number: The range; default: the only SC range.

    Returns:
        The number of bytes written.

    Raises:
        InvalidInput: There is no such range, or the data exceeds it. Chunks that fit are written.
        NotFound, InsufficientResources, NotPermitted: The segment cannot be written.
    """
    item = _range(store, ref, number)
    path = live_file(store, item)
    if offset < 0:
        raise InvalidInput(f"the offset {offset} is negative", hint="give an offset from 0")
    with file_errors(store.root), path.open("r+b", buffering=0) as file:
        flock(file.fileno())
        at = offset
        for part in data:
            room = item.segment.size - at
            if len(part) > max(room, 0):
                raise InvalidInput(
                    f"the data ends at byte {at + len(part)}, beyond the {item.segment.size} bytes "
                    f"of {item.segment.name}",
                    hint=f"write less, or at another --offset; {at - offset} bytes were written",
                )
            at += write_at(file.fileno(), part, at)
    return at - offset


def _range(store: Store, ref: Reference, number: int | None) -> Placed:
    artifact = store.resolve(ref, "segment")
    ranges = SegmentConfig.of(artifact).ranges
    found = [n for n, item in enumerate(ranges) if item.page_class is PageClass.SC]
    wanted = found if number is None else [n for n in found if n == number]
    if len(wanted) != 1:
        which = ", ".join(f"{n}: {item.page_class}" for n, item in enumerate(ranges))
        raise InvalidInput(
            f"{ref} has no such SC range ({which})"
            if not wanted
            else f"{ref} has several SC ranges ({which})",
            hint="name a range of class SC with --range N; the host writes no other class",
        )
    return ranges_of(artifact, "")[wanted[0]]
