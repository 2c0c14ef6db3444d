"""Read artifacts: every small blob is checked against its digest, large ones only by `verify`.

Not here: names (names.py), and changes (store.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from onecopy.errors import StoreDamaged
from onecopy.store import domain, oci
from onecopy.store.artifact import Artifact, Layer
from onecopy.store.digest import file_digest
from onecopy.store.layout import Layout


def index(layout: Layout) -> oci.Index:
    """Read ``index.json``.

    Raises:
        StoreDamaged: it is missing or not valid.
    """
    try:
        data = layout.index.read_bytes()
    except FileNotFoundError:
        data = b""
    hint = "restore it from a backup; without one, move the store away and build again"
    return oci.decode(data, oci.Index, layout.index, hint)


def small_blob(layout: Layout, digest: str, owner: str) -> bytes:
    """Read a small blob of the artifact ``owner``.

    Raises:
        StoreDamaged: the blob is missing or does not match its digest.
    """
    path = layout.blob(digest)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise StoreDamaged(f"{path} is missing", hint=repair(owner)) from error
    if oci.digest_of(data) != digest:
        raise StoreDamaged(f"{path} does not match its digest", hint=repair(owner))
    return data


def repair(owner: str) -> str:
    """Return the hint for a damaged blob of the artifact ``owner``."""
    return f"`onecopy rm {owner}`, then build or save it again"


def artifact(layout: Layout, entry: oci.Descriptor) -> Artifact:
    """Load the artifact of an index entry.

    Raises:
        StoreDamaged: a record is missing or not valid.
    """
    manifest = _manifest(layout, entry.digest, entry.ref)
    config = small_blob(layout, manifest.config.digest, entry.ref)
    return bare_artifact(layout, entry, config, manifest.layers)


def bare_artifact(
    layout: Layout,
    entry: oci.Descriptor,
    config: bytes = b"",
    layers: Sequence[oci.Descriptor] = (),
) -> Artifact:
    """Make an artifact from an index entry alone, with the given content."""
    name, _, version = entry.ref.partition(":")
    return Artifact(
        kind=entry.kind,
        name=name,
        version=version,
        digest=entry.digest,
        created=entry.annotations.get(oci.CREATED, ""),
        config=config,
        layers=tuple(_layer(layout, blob) for blob in layers),
    )


def verify(layout: Layout, digest: str, owner: str) -> None:
    """Read and hash every blob of a manifest.

    Raises:
        StoreDamaged: a blob is missing or does not match its digest or trust domain.
    """
    manifest = _manifest(layout, digest, owner)
    small_blob(layout, manifest.config.digest, owner)
    for blob in manifest.layers:
        path = layout.blob(blob.digest)
        try:
            found = file_digest(path)
        except FileNotFoundError as error:
            raise StoreDamaged(f"{path} is missing", hint=repair(owner)) from error
        if found != blob.digest or path.stat().st_size != blob.size:
            raise StoreDamaged(f"{path} does not match its digest", hint=repair(owner))
        if not domain.has_matching_trailer(blob, path):
            raise StoreDamaged(
                f"{path} does not belong to the trust domain of {owner}", hint=repair(owner)
            )


def _manifest(layout: Layout, digest: str, owner: str) -> oci.Manifest:
    data = small_blob(layout, digest, owner)
    return oci.decode(data, oci.Manifest, layout.blob(digest), repair(owner))


def _layer(layout: Layout, blob: oci.Descriptor) -> Layer:
    path = layout.blob(blob.digest)
    size, trust = domain.content_size(blob), domain.domain_of(blob)
    if size < 0:
        raise StoreDamaged(
            f"{path} is too small for the trailer of its trust domain",
            hint="`onecopy verify` shows which artifact is damaged",
        )
    return Layer(blob.media_type, blob.digest, size, blob.annotations, path, trust)
