"""What the host writes and guests read: the SC ranges of segments (`onecopy write`)."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable

from onecopy.errors import InvalidInput
from onecopy.guest.backing import live_file
from onecopy.guest.machine import Placed, ranges_of
from onecopy.images.range_record import SegmentConfig
from onecopy.linux.files import write_at
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
    """Write to an SC range of a segment; all guests see it at once. Returns how many bytes.

    ``number`` is the range, by default the only one that is SC; ``offset`` is in bytes. What is
    written stays until the segment goes. Two writers take turns; a guest that reads meanwhile may
    see a part. Raises NotFound, InvalidInput (no such range, or it does not fit: then what came
    before the end of the range is written), InsufficientResources, NotPermitted.
    """
    item = _range(store, ref, number)
    path = live_file(store, item)
    if offset < 0:
        raise InvalidInput(f"{offset} is before the range begins")
    with file_errors(store.root), path.open("r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        at = offset
        for part in data:
            room = item.segment.size - at
            if len(part) > max(room, 0):
                raise InvalidInput(
                    f"the data goes beyond the end of {item.segment.name} at "
                    f"{item.segment.size} bytes",
                    hint=f"{at - offset} bytes were written; write less, or at another --offset",
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
            f"{ref} has no such range for the host to write to ({which})"
            if not wanted
            else f"{ref} has several SC ranges ({which})",
            hint="say which with --range N; only SC ranges are the host's to write",
        )
    return ranges_of(artifact, "")[wanted[0]]
