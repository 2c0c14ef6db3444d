"""Loads blobs into the host's page cache before guests need them.

Guests map blobs, and wait for the disk at the first access to a page that is not cached. Preloading
reads a whole blob, or the pages that earlier guests accessed (access_record.py). Not here: locking
pages in memory (pin.py).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from onecopy.errors import NotFound, NotPermitted, StoreDamaged
from onecopy.guest.pagecache import access_record
from onecopy.linux import prefetch
from onecopy.linux.counters import residency
from onecopy.linux.prefetch import Extent
from onecopy.linux.sparse import data_ranges
from onecopy.store import Artifact, Layer, Store
from onecopy.store.disk import file_errors
from onecopy.store.oci import ROLE

if TYPE_CHECKING:
    from onecopy.guest.pagecache.mapped import Users


class Warmed(msgspec.Struct, frozen=True):
    """The result for one blob; sizes are bytes, None is unknown."""

    name: str
    """``NAME:VERSION`` of the artifact."""
    role: str
    digest: str
    size: int
    """Size of the file, holes included."""
    action: str
    """``whole`` or ``recorded``: the part that was loaded; ``dropped``; ``touched``: the pages that
    guests accessed were recorded."""
    requested_bytes: int
    """Size of the part that was loaded or recorded."""
    before: int | None
    """Resident size of the whole file before."""
    after: int | None
    """Resident size of the whole file after."""


def warm(store: Store, artifact: Artifact, *, whole: bool = False) -> list[Warmed]:
    """Load the pages that earlier guests accessed, or all without a record.

    Args:
        store: The store of the artifact.
        artifact: The artifact to load.
        whole: Whether to load all pages in any case.

    Raises:
        NotFound, StoreDamaged: A blob is missing or cannot be read.
    """
    return [_warm(store, artifact, layer, whole) for layer in blobs_of(artifact)]


def drop(store: Store, artifact: Artifact) -> list[Warmed]:
    """Drop blobs from the page cache, except mapped and pinned pages."""
    return [
        _measure(store, artifact, layer, "dropped", [], partial(prefetch.drop, layer.path))
        for layer in blobs_of(artifact)
    ]


def record(store: Store, artifact: Artifact, users: Users | None = None) -> list[Warmed]:
    """Record the pages that ``users`` have accessed.

    For a blob that no user maps, all pages in the page cache are recorded.

    Raises:
        NotPermitted: The kernel does not show this user which pages are in memory.
        NotFound: A blob is missing.
    """
    found = []
    for layer in blobs_of(artifact):
        mapped = users.pages(layer) if users else None
        pages = residency.resident_pages(layer.path) if mapped is None else mapped
        if pages is None:
            raise NotPermitted(
                f"the kernel shows only the owner of {layer.path} which pages are in memory",
                hint="run the command as the store's owner",
            )
        extents = access_record.extents_of(pages, layer.blob_size)
        with file_errors(store.root):
            access_record.write(store, layer, extents)
        what = "recorded" if mapped is None else "touched"
        found.append(_measure(store, artifact, layer, what, extents, lambda: None))
    _forget_removed(store, artifact)
    return found


def _forget_removed(store: Store, recorded: Artifact) -> None:
    with contextlib.suppress(StoreDamaged):
        there = [*store.artifacts(), *store.pending(), recorded]
        access_record.prune(store, {layer.digest for each in there for layer in each.layers})


def begin_aside(store: Store, layers: Iterable[Layer]) -> None:
    """Call `begin` in a thread, for starts of guests.

    The kernel blocks a process that requests many reads until most of them are done: 0.1 s for
    64 MiB.
    """
    # A daemon thread ends with this process.
    threading.Thread(target=begin, args=(store, tuple(layers)), daemon=True).start()


def begin(store: Store, layers: Iterable[Layer]) -> None:
    """Start to read the recorded pages of the blobs that a guest will need.

    This is only an optimisation. Errors are ignored, and a thread waits if the disk's queue is
    full.
    """
    recorded = [(layer.path, access_record.read(store, layer)) for layer in layers]
    wanted = [(path, extents) for path, extents in recorded if extents]
    if wanted:
        threading.Thread(target=_begin, args=(wanted,), daemon=True).start()


def _begin(wanted: list[tuple[Path, list[Extent]]]) -> None:
    for path, extents in wanted:
        with contextlib.suppress(OSError):
            prefetch.begin(path, extents)


def blobs_of(artifact: Artifact) -> list[Layer]:
    """Return the layers of an artifact, without duplicates."""
    return list({layer.digest: layer for layer in artifact.layers}.values())


def _warm(store: Store, artifact: Artifact, layer: Layer, whole: bool) -> Warmed:
    known = None if whole else access_record.read(store, layer)
    extents = data_of(layer) if known is None else known
    what = "whole" if known is None else "recorded"
    load = partial(prefetch.load, layer.path, extents)
    return _measure(store, artifact, layer, what, extents, load)


def data_of(layer: Layer) -> list[Extent]:
    """Return the extents of a blob without its holes, which would fill memory with zeroes.

    Raises:
        NotFound: The blob's file is missing.
    """
    try:
        with layer.path.open("rb") as file:
            ranges = list(data_ranges(file.fileno(), layer.blob_size))
    except FileNotFoundError as error:
        raise NotFound(
            f"there is no file {layer.path}", hint="check the store with `onecopy verify`"
        ) from error
    return [(start, end - start) for start, end in ranges]


def _measure(
    store: Store,
    artifact: Artifact,
    layer: Layer,
    what: str,
    extents: Iterable[Extent],
    work: Callable[[], None],
) -> Warmed:
    """Do ``work``, and measure the blob's resident size before and after."""
    before = residency.resident_bytes(layer.path)
    with file_errors(store.root):
        work()
    return Warmed(
        name=artifact.ref,
        role=layer.annotations.get(ROLE, ""),
        digest=layer.digest,
        size=layer.blob_size,
        action=what,
        requested_bytes=sum(length for _, length in extents),
        before=before,
        after=residency.resident_bytes(layer.path),
    )
