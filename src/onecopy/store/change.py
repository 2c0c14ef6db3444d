"""Changes to the store: made under its lock, with a marker file, and followed by a sweep.

A failed change is undone in the same way as one that was killed.

Not here: the changes themselves (store.py, putting.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onecopy.linux.statfs import is_full
from onecopy.store import access, collect, oci, reserve
from onecopy.store.disk import file_errors
from onecopy.store.layout import Layout


@contextmanager
def change(layout: Layout) -> Iterator[None]:
    """Hold the store's lock during a change.

    Raises:
        InsufficientResources: the disk is full.
        NotPermitted: this user may not change the store.
        StoreDamaged: the disk failed.
    """
    with file_errors(layout.root), layout.locked():
        # If this process is killed the marker stays, so the next command that opens the store
        # sweeps.
        _create_marker(layout)
        try:
            yield
        finally:
            collect.sweep(layout)
            reserve.refill(layout)


def _create_marker(layout: Layout) -> None:
    mark = layout.tmp / "change"
    try:
        mark.touch()
    except OSError as error:
        if not is_full(error) or not reserve.take(layout, reserve.MARK, mark):
            raise


def write_blob(layout: Layout, digest: str, data: bytes) -> None:
    """Store a small blob; the caller holds the lock."""
    blob = layout.blob(digest)
    # No guest maps these small blobs, so a damaged one can be replaced.
    if not blob.exists() or blob.read_bytes() != data:
        layout.write(blob, data, 0o444)


def write_index(layout: Layout, index: oci.Index) -> None:
    """Replace the index atomically; the caller holds the lock."""
    data = oci.encode(access.prune(index))
    try:
        layout.write(layout.index, data)
    except OSError as error:
        if not is_full(error) or not reserve.write(layout, layout.index, data):
            raise
