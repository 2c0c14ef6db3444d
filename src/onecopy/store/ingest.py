"""Turning files into blobs: measured before the store's lock is taken, moved in under it.

Not here: naming them (store.py).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from onecopy.errors import InvalidInput, NotFound, StoreDamaged
from onecopy.linux import verity
from onecopy.store.artifact import NewLayer
from onecopy.store.digest import file_digest
from onecopy.store.disk import require_disk
from onecopy.store.domain import MARKS, copy_content, domain_of_file, marks, seal, trailer, unseal
from onecopy.store.layout import Layout
from onecopy.store.oci import Descriptor, is_digest


def in_domain(
    layout: Layout, layer: NewLayer, domain: str, workspace: Callable[[], Path]
) -> NewLayer:
    """The layer as one of a trust domain: the blob of another one is copied into a workspace.

    Raises NotFound (no such blob), InvalidInput, InsufficientResources.
    """
    if layer.path is not None or layer.digest is None:
        return layer
    _require_digest(layer.digest)
    blob = layout.blob(layer.digest)
    try:
        with blob.open("rb") as file:
            found = domain_of_file(file.fileno())
    except FileNotFoundError as error:
        raise _missing(layer.digest) from error
    if found == domain:
        return layer
    work = workspace()
    require_disk(work, blob.stat().st_blocks * 512)
    # Of its own: the same blob may come twice.
    out = work / f"{os.urandom(6).hex()}-{blob.name}"
    copy_content(blob, out)
    return NewLayer(out, layer.media_type, layer.annotations, size=layer.size)


def follow(config: bytes, layers: Sequence[NewLayer], blobs: Sequence[Descriptor]) -> bytes:
    """``config`` with the digests of blobs that were copied made those of their copies."""
    for layer, blob in zip(layers, blobs, strict=True):
        if layer.digest and layer.digest != blob.digest:
            config = config.replace(layer.digest.encode(), blob.digest.encode())
    return config


def describe(layout: Layout, layer: NewLayer, domain: str, clean: ExitStack) -> Descriptor:
    """Hash and sync the layer's file (read-only from now on), or look its digest up; no lock.

    What ``clean`` does at its end makes the file again what it was, unless it is a blob by then.
    Raises InvalidInput, NotFound (no such file or blob), StoreDamaged (not of the given size).
    """
    if (layer.path is None) == (layer.digest is None):
        raise InvalidInput("a new layer has either a path or a digest")
    tail = len(trailer(domain))
    if layer.path:
        _require_file(layer.path)
        seal(layer.path, domain)
        clean.callback(_unseal, layer.path, domain)
    digest, size = _measure_file(layer) if layer.path else _measure_blob(layout, layer)
    if layer.size is not None and layer.size != size - tail:
        raise StoreDamaged(
            f"{layer.path or layout.blob(digest)} has {size - tail} bytes, not {layer.size}",
            hint="`onecopy verify` finds out which artifact is damaged",
        )
    return Descriptor(
        media_type=layer.media_type,
        digest=digest,
        size=size,
        annotations={
            **{key: text for key, text in layer.annotations.items() if key not in MARKS},
            **marks(domain, size - tail),
        },
    )


def _unseal(path: Path, domain: str) -> None:
    # Gone if it was moved in, or if there was such a blob already.
    if domain and path.exists():
        unseal(path, domain)


def _require_file(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
    if not stat.S_ISREG(mode):
        raise InvalidInput(f"{path} is not a regular file")


def _measure_file(layer: NewLayer) -> tuple[str, int]:
    path = layer.path
    assert path is not None  # noqa: S101 - for the type checker; describe() saw to it
    with path.open("rb") as file:
        os.fchmod(file.fileno(), 0o444)
        os.fsync(file.fileno())
        return file_digest(path), os.fstat(file.fileno()).st_size


def _measure_blob(layout: Layout, layer: NewLayer) -> tuple[str, int]:
    digest = layer.digest or ""
    _require_digest(digest)
    try:
        return digest, layout.blob(digest).stat().st_size
    except FileNotFoundError as error:
        raise _missing(digest) from error


def _require_digest(digest: str) -> None:
    if not is_digest(digest):
        raise InvalidInput(f"{digest!r} is not a digest")


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
        # Where there is such a thing. A blob is one without it, too.
        with suppress(OSError):
            verity.enable(blob)


def _missing(digest: str) -> NotFound:
    return NotFound(
        f"the store has no blob {digest}",
        hint="what had it was removed meanwhile: a lease would have kept it",
    )
