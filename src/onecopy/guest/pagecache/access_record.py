"""Records which pages of a blob guests have accessed: one record per blob, in the store's cache.

A record is a hint. A missing, damaged or outdated record is ignored, and the cache may be emptied
at any time. Not here: loading the pages (preload.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from onecopy.linux import files
from onecopy.linux.prefetch import Extent
from onecopy.model import PAGE_SIZE
from onecopy.store import Layer, Store

_VERSION = 1
_PREFIX, _SUFFIX = "touched-", ".json"
#: Gaps of up to this many pages are read, too, because that is faster than another request.
_GAP = 4


class AccessRecord(msgspec.Struct, frozen=True):
    """A record."""

    version: int
    digest: str
    """Digest of the blob."""
    size: int
    """Bytes of the blob's file."""
    extents: tuple[tuple[int, int], ...]
    """Pairs (first byte, number of bytes), in order."""


def extents_of(pages: bytes, size: int) -> list[Extent]:
    """Convert a page map to extents, with small gaps closed.

    Args:
        pages: One byte per page, 1 for an accessed one.
        size: Bytes of the file.
    """
    found: list[Extent] = []
    for first, end in _runs(pages):
        start, stop = first * PAGE_SIZE, min(end * PAGE_SIZE, size)
        if found and start - sum(found[-1]) <= _GAP * PAGE_SIZE:
            start = found.pop()[0]
        found.append((start, stop - start))
    return found


def _runs(pages: bytes) -> Iterator[tuple[int, int]]:
    """Yield (first page, page behind the last) of each run of ones."""
    first = pages.find(1)
    while first >= 0:
        end = pages.find(0, first)
        end = len(pages) if end < 0 else end
        yield first, end
        first = pages.find(1, end)


def write(store: Store, layer: Layer, extents: list[Extent]) -> None:
    """Write the record of a blob; replace an earlier one.

    Raises:
        OSError: The record cannot be written.
    """
    record = AccessRecord(_VERSION, layer.digest, layer.blob_size, tuple(extents))
    files.replace(store.cache / _name(layer.digest), msgspec.json.encode(record))


def read(store: Store, layer: Layer) -> list[Extent] | None:
    """Return the recorded extents of a blob; None without a valid record."""
    try:
        data = (store.cache / _name(layer.digest)).read_bytes()
        record = msgspec.json.decode(data, type=AccessRecord)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if (record.version, record.digest, record.size) != (_VERSION, layer.digest, layer.blob_size):
        return None
    return list(record.extents) if _fits(record) else None


def forget(store: Store, layer: Layer) -> None:
    """Remove the record of a blob, if there is one."""
    (store.cache / _name(layer.digest)).unlink(missing_ok=True)


def _fits(record: AccessRecord) -> bool:
    end = 0
    for start, length in record.extents:
        if start < end or length <= 0 or start % PAGE_SIZE:
            return False
        end = start + length
    return end <= record.size


def prune(store: Store, blobs: set[str]) -> None:
    """Remove the records of all blobs but ``blobs`` (digests)."""
    wanted = {_name(digest) for digest in blobs}
    for path in store.cache.glob(f"{_PREFIX}*"):
        if path.name not in wanted:
            path.unlink(missing_ok=True)


def _name(digest: str) -> str:
    return f"{_PREFIX}{digest.removeprefix('sha256:')}{_SUFFIX}"
