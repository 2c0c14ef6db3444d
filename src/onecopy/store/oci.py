"""The JSON on disk: OCI descriptors, manifests and the index.

Unknown fields are ignored.

Not here: where the files are (layout.py), and when they may change (store.py).

Source:
    OCI image-spec (descriptor.md, manifest.md, image-index.md, image-layout.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from onecopy.errors import InvalidInput, StoreDamaged
from onecopy.model import Reference

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
LAYOUT_VERSION = "1.0.0"
REF_NAME = "org.opencontainers.image.ref.name"
CREATED = "org.opencontainers.image.created"
#: The annotation that distinguishes the layers of an artifact.
ROLE = "org.onecopy.role"
KINDS = ("segment", "kernel", "system")

_KIND_TYPE = re.compile(r"application/vnd\.onecopy\.([a-z]+)\.v1\+json")
# Digests become paths, so no other form is accepted from disk.
_DIGEST = r"\Asha256:[0-9a-f]{64}\Z"
Digest = Annotated[str, msgspec.Meta(pattern=_DIGEST)]
Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_T = TypeVar("_T")


class _Record(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Immutable; camelCase on disk; fields with default values are omitted."""


class Descriptor(_Record, frozen=True, kw_only=True):
    """A reference to a blob of ``size`` bytes (image-spec descriptor.md)."""

    media_type: str
    digest: Digest
    size: Size
    artifact_type: str | None = None
    annotations: dict[str, str] = {}
    # onecopy does not use these; it keeps them for entries of other tools in the same index.
    urls: list[str] = []
    data: str | None = None
    platform: dict[str, Any] | None = None

    @property
    def ref(self) -> str:
        """The name in the index, or ""."""
        return self.annotations.get(REF_NAME, "")

    @property
    def kind(self) -> str:
        """One of KINDS, or "" if it is not an artifact of onecopy."""
        match = _KIND_TYPE.fullmatch(self.artifact_type or "")
        return match[1] if match and match[1] in KINDS else ""


class Manifest(_Record, frozen=True, kw_only=True):
    """An artifact: a config and layers (image-spec manifest.md)."""

    schema_version: Literal[2]
    media_type: str
    artifact_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: dict[str, str] = {}


class Index(_Record, frozen=True, kw_only=True):
    """``index.json``: the names (image-spec image-index.md)."""

    schema_version: Literal[2]
    media_type: str = ""
    manifests: tuple[Descriptor, ...]
    annotations: dict[str, str] = {}


class Links(_Record, frozen=True, kw_only=True):
    """The references of any manifest or index: all that garbage collection needs."""

    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] = ()
    manifests: tuple[Descriptor, ...] = ()


class LayoutMark(_Record, frozen=True, kw_only=True):
    """``oci-layout``: marks a directory as an OCI image layout."""

    image_layout_version: str


EMPTY_INDEX = Index(schema_version=2, media_type=INDEX_TYPE, manifests=())


def encode(record: msgspec.Struct) -> bytes:
    """Encode a record as JSON; equal records give equal bytes."""
    return msgspec.json.encode(record, order="deterministic")


def decode(data: bytes, into: type[_T], path: Path, hint: str) -> _T:
    """Decode the content of the file ``path``.

    Raises:
        StoreDamaged: it is not valid; the error has ``hint``.
    """
    try:
        return msgspec.json.decode(data, type=into)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StoreDamaged(f"{path} is not valid: {error}", hint=hint) from error


def is_digest(text: str) -> bool:
    """Whether ``text`` is a full digest, ``sha256:HEX``."""
    return re.match(_DIGEST, text) is not None


def digest_of(data: bytes) -> str:
    """Return ``sha256:HEX`` of ``data``."""
    import hashlib  # few commands check a digest, and it loads OpenSSL

    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def artifact_type(kind: str) -> str:
    """Return the artifactType of a kind.

    Raises:
        InvalidInput: there is no such kind.
    """
    if kind not in KINDS:
        raise InvalidInput(
            f"{kind!r} is not a kind of artifact", hint=f"use one of {', '.join(KINDS)}"
        )
    return f"application/vnd.onecopy.{kind}.v1+json"


def manifest(
    kind: str,
    config: bytes,
    layers: Sequence[Descriptor],
    annotations: Mapping[str, str] | None = None,
) -> Manifest:
    """Make a manifest; it has no name or date, so that equal content has an equal digest."""
    return Manifest(
        schema_version=2,
        media_type=MANIFEST_TYPE,
        artifact_type=artifact_type(kind),
        config=Descriptor(
            media_type=f"application/vnd.onecopy.{kind}.config.v1+json",
            digest=digest_of(config),
            size=len(config),
        ),
        layers=tuple(layers),
        annotations=dict(annotations or {}),
    )


def index_entry(kind: str, ref: Reference, data: bytes, created: str) -> Descriptor:
    """Make the index entry of an encoded manifest; ``created`` is RFC 3339 UTC."""
    names: Mapping[str, str] = {REF_NAME: f"{ref.name}:{ref.version}", CREATED: created}
    return Descriptor(
        media_type=MANIFEST_TYPE,
        digest=digest_of(data),
        size=len(data),
        artifact_type=artifact_type(kind),
        annotations=dict(names),
    )
