"""Having blobs in the host's page cache before guests need them.

Guests map blobs, and wait for the disk at the first touch of each part that is not in memory. So a
blob can be loaded beforehand: all of it, or what earlier guests touched (access_record.py). Not
here: keeping it there (pin.py).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import msgspec

from onecopy.errors import NotFound, NotPermitted, StoreDamaged
from onecopy.guest.pagecache import access_record
from onecopy.guest.pagecache.mapped import Users
from onecopy.linux import prefetch
from onecopy.linux.counters import residency
from onecopy.linux.prefetch import Extent
from onecopy.linux.sparse import data_ranges
from onecopy.store import Artifact, Layer, Store
from onecopy.store.disk import file_errors
from onecopy.store.oci import ROLE


class Warmed(msgspec.Struct, frozen=True):
    """What was done with one blob; all sizes are bytes, None is unknown."""

    name: str
    """``NAME:VERSION`` of what it was asked for by."""
    role: str
    digest: str
    size: int
    """Of the file, holes included."""
    action: str
    """``recorded``, ``whole`` or ``dropped``: what was asked of the kernel; or ``touched``, if what
    was recorded is known from guests."""
    requested_bytes: int
    """How much was to be loaded, or was recorded."""
    before: int | None
    """Resident before, of the whole file, whoever loaded it."""
    after: int | None
    """Resident after that."""


def warm(store: Store, artifact: Artifact, *, whole: bool = False) -> list[Warmed]:
    """Load what earlier guests touched, or all if nothing is recorded, or with ``whole``.

    Raises NotFound, StoreDamaged.
    """
    return [_warm(store, artifact, layer, whole) for layer in blobs_of(artifact)]


def drop(store: Store, artifact: Artifact) -> list[Warmed]:
    """Drop blobs from the page cache, but for what is mapped or pinned."""
    return [
        _told(store, artifact, layer, "dropped", [], partial(prefetch.drop, layer.path))
        for layer in blobs_of(artifact)
    ]


def record(store: Store, artifact: Artifact, users: Users | None = None) -> list[Warmed]:
    """Remember the pages that ``users`` have touched.

    Of blobs that none of them maps it is those that are in the page cache now, whoever brought them
    there. Raises NotPermitted where the kernel does not tell this user, NotFound.
    """
    found = []
    for layer in blobs_of(artifact):
        mapped = users.pages(layer) if users else None
        pages = residency.resident_pages(layer.path) if mapped is None else mapped
        if pages is None:
            raise NotPermitted(
                f"the kernel tells only the owner of {layer.path} which pages are in memory",
                hint="become the user who owns the store",
            )
        extents = access_record.extents_of(pages, layer.blob_size)
        with file_errors(store.root):
            access_record.write(store, layer, extents)
        what = "recorded" if mapped is None else "touched"
        found.append(_told(store, artifact, layer, what, extents, lambda: None))
    _forget_removed(store, artifact)
    return found


def _forget_removed(store: Store, recorded: Artifact) -> None:
    with contextlib.suppress(StoreDamaged):
        there = [*store.artifacts(), *store.pending(), recorded]
        access_record.prune(store, {layer.digest for each in there for layer in each.layers})


def begin_aside(store: Store, layers: Iterable[Layer]) -> None:
    """`begin`, without waiting for that either: for starts.

    The kernel lets who asks for many reads wait until most of them are done: a tenth of a second
    for 64 MiB.
    """
    # Gone with this process, if that ends before.
    threading.Thread(target=begin, args=(store, tuple(layers)), daemon=True).start()


def begin(store: Store, layers: Iterable[Layer]) -> None:
    """Let the kernel begin to read what is recorded of blobs that a guest will need.

    It is help, no more: no error of it keeps a guest from starting, and where the disk's queue is
    full a thread waits, not the start.
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
    """Its blobs, each once."""
    return list({layer.digest: layer for layer in artifact.layers}.values())


def _warm(store: Store, artifact: Artifact, layer: Layer, whole: bool) -> Warmed:
    known = None if whole else access_record.read(store, layer)
    extents = data_of(layer) if known is None else known
    what = "whole" if known is None else "recorded"
    return _told(store, artifact, layer, what, extents, partial(prefetch.load, layer.path, extents))


def data_of(layer: Layer) -> list[Extent]:
    """All of a blob but its holes, which would fill memory with zeroes."""
    try:
        with layer.path.open("rb") as file:
            ranges = list(data_ranges(file.fileno(), layer.blob_size))
    except FileNotFoundError as error:
        raise NotFound(f"no file {layer.path}", hint="`onecopy verify` says what else") from error
    return [(start, end - start) for start, end in ranges]


def _told(
    store: Store,
    artifact: Artifact,
    layer: Layer,
    what: str,
    extents: Iterable[Extent],
    work: Callable[[], None],
) -> Warmed:
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
