"""How the store is changed: under its lock, with a mark, and swept at the end.

A change that failed is undone the way a killed one is. Not here: the changes themselves (store.py,
putting.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onecopy.store import access, collect, oci, reserve
from onecopy.store.disk import file_errors
from onecopy.store.layout import Layout


@contextmanager
def change(layout: Layout) -> Iterator[None]:
    """Hold the store's lock; raise InsufficientResources, NotPermitted, StoreDamaged."""
    with file_errors(layout.root), layout.locked():
        # A kill leaves this mark, and so the next one who opens the store sweeps.
        _mark(layout)
        try:
            yield
        finally:
            collect.sweep(layout)
            reserve.keep(layout)


def _mark(layout: Layout) -> None:
    mark = layout.tmp / "change"
    try:
        mark.touch()
    except OSError as error:
        if not reserve.is_full(error) or not reserve.take(layout, reserve.MARK, mark):
            raise


def write_blob(layout: Layout, digest: str, data: bytes) -> None:
    """Store a small blob; the lock is held."""
    blob = layout.blob(digest)
    # No guest maps these small blobs, so a damaged one may be replaced.
    if not blob.exists() or blob.read_bytes() != data:
        layout.write(blob, data, 0o444)


def write_index(layout: Layout, index: oci.Index) -> None:
    """Make ``index`` what counts, all of it at once; the lock is held."""
    data = oci.encode(access.prune(index))
    try:
        layout.write(layout.index, data)
    except OSError as error:
        if not reserve.is_full(error) or not reserve.write(layout, layout.index, data):
            raise
