"""Turning files into blobs: measured before the store's lock is taken, moved in under it.

Not here: naming them (store.py).
"""

from __future__ import annotations

import errno
import os
import stat

from onecopy.errors import InvalidInput, NotFound, StoreDamaged
from onecopy.store.artifact import NewLayer
from onecopy.store.digest import file_digest
from onecopy.store.layout import Layout
from onecopy.store.oci import Descriptor, is_digest


def describe(layout: Layout, layer: NewLayer) -> Descriptor:
    """Hash and sync the layer's file (read-only from now on), or look its digest up; no lock.

    Raises InvalidInput, NotFound (no such file or blob), StoreDamaged (not of the given size).
    """
    if (layer.path is None) == (layer.digest is None):
        raise InvalidInput("a new layer has either a path or a digest")
    digest, size = _measure_file(layer) if layer.path else _measure_blob(layout, layer)
    if layer.size is not None and layer.size != size:
        raise StoreDamaged(
            f"{layer.path or layout.blob(digest)} has {size} bytes, not {layer.size}",
            hint="`onecopy verify` finds out which artifact is damaged",
        )
    return Descriptor(
        media_type=layer.media_type,
        digest=digest,
        size=size,
        annotations=dict(layer.annotations),
    )


def _measure_file(layer: NewLayer) -> tuple[str, int]:
    path = layer.path
    assert path is not None  # noqa: S101 - for the type checker; describe() saw to it
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
    if not stat.S_ISREG(mode):
        raise InvalidInput(f"{path} is not a regular file")
    with path.open("rb") as file:
        os.fchmod(file.fileno(), 0o444)
        os.fsync(file.fileno())
        return file_digest(path), os.fstat(file.fileno()).st_size


def _measure_blob(layout: Layout, layer: NewLayer) -> tuple[str, int]:
    digest = layer.digest or ""
    if not is_digest(digest):
        raise InvalidInput(f"{digest!r} is not a digest")
    try:
        return digest, layout.blob(digest).stat().st_size
    except FileNotFoundError as error:
        raise _missing(digest) from error


def move_in(layout: Layout, layer: NewLayer, digest: str) -> None:
    """Make the layer's file the blob ``digest``; the store's lock is held.

    Raises NotFound if the layer has no file and the blob is gone, InvalidInput if the file is on
    another file system.
    """
    blob = layout.blob(digest)
    if blob.exists():
        # Guests map it: the same bytes in another file would be a second copy in memory.
        if layer.path:
            layer.path.unlink(missing_ok=True)
    elif layer.path is None:
        raise _missing(digest)
    else:
        try:
            layer.path.rename(blob)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            raise InvalidInput(
                f"{layer.path} is not on the file system of the store {layout.root}",
                hint="make it in a workspace of the store",
            ) from error


def _missing(digest: str) -> NotFound:
    return NotFound(
        f"the store has no blob {digest}",
        hint="what had it was removed meanwhile: a lease would have kept it",
    )
