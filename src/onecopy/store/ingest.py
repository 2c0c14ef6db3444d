"""Turn files into blobs: hash them without the store's lock, move them in under it.

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
    """Return a layer for a trust domain; a blob of another domain is copied.

    Args:
        workspace: creates the directory for copies.

    Raises:
        NotFound: there is no such blob.
        InvalidInput: the digest is not valid.
        InsufficientResources: the disk is full.
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
    # The name is unique, because the same blob may occur twice.
    out = work / f"{os.urandom(6).hex()}-{blob.name}"
    copy_content(blob, out)
    return NewLayer(out, layer.media_type, layer.annotations, size=layer.size)


def replace_digests(
    config: bytes, layers: Sequence[NewLayer], blobs: Sequence[Descriptor]
) -> bytes:
    """Replace the digests of copied blobs in ``config`` by those of the copies."""
    for layer, blob in zip(layers, blobs, strict=True):
        if layer.digest and layer.digest != blob.digest:
            config = config.replace(layer.digest.encode(), blob.digest.encode())
    return config


def describe(layout: Layout, layer: NewLayer, domain: str, clean: ExitStack) -> Descriptor:
    """Hash and sync a layer's file, which becomes read-only, or look up its blob; takes no lock.

    Args:
        clean: restores the file when it closes, unless the file has become a blob.

    Raises:
        InvalidInput: the layer has neither or both of a path and a digest.
        NotFound: there is no such file or blob.
        StoreDamaged: the size is not the expected one.
    """
    if (layer.path is None) == (layer.digest is None):
        raise InvalidInput("a new layer needs either a path or a digest")
    tail = len(trailer(domain))
    if layer.path:
        _require_file(layer.path)
        seal(layer.path, domain)
        clean.callback(_unseal, layer.path, domain)
    digest, size = _measure_file(layer) if layer.path else _measure_blob(layout, layer)
    if layer.size is not None and layer.size != size - tail:
        raise StoreDamaged(
            f"{layer.path or layout.blob(digest)} has {size - tail} bytes instead of {layer.size}",
            hint="`onecopy verify` shows which artifact is damaged",
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
    # The path is gone if the file became a blob, or if the blob existed already.
    if domain and path.exists():
        unseal(path, domain)


def _require_file(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError as error:
        raise NotFound(f"the file {path} does not exist") from error
    if not stat.S_ISREG(mode):
        raise InvalidInput(f"{path} is not a regular file")


def _measure_file(layer: NewLayer) -> tuple[str, int]:
    path = layer.path
    assert path is not None  # noqa: S101 - for the type checker; describe() has checked this
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
        raise InvalidInput(f"{digest!r} is not a valid digest")


def move_in(layout: Layout, layer: NewLayer, digest: str) -> None:
    """Make a layer's file the blob ``digest``; the caller holds the store's lock.

    Raises:
        NotFound: the layer has no file, and the blob is gone.
        InvalidInput: the file is on another file system.
    """
    blob = layout.blob(digest)
    if blob.exists():
        # Guests may map the existing blob. The same content in a new file would be a second copy in
        # memory.
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
                hint="create the file in a workspace of the store",
            ) from error
        # fs-verity is optional: blobs work without it.
        with suppress(OSError):
            verity.enable(blob)


def _missing(digest: str) -> NotFound:
    return NotFound(
        f"the store has no blob {digest}",
        hint="the artifact that had it was removed meanwhile; repeat the command",
    )
