"""What lies on disk as JSON: OCI descriptors, manifests and the index.

The specification is the OCI image-spec (descriptor.md, manifest.md, image-index.md,
image-layout.md). Fields that we do not know are ignored. Not here: where the files lie (layout.py)
or when they may change (store.py).
"""

from __future__ import annotations

import hashlib
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
#: The annotation by which an artifact tells its layers apart.
ROLE = "org.onecopy.role"
KINDS = ("segment", "kernel", "system")

_KIND_TYPE = re.compile(r"application/vnd\.onecopy\.([a-z]+)\.v1\+json")
# A digest becomes a path: nothing but this may be read from disk.
_DIGEST = r"\Asha256:[0-9a-f]{64}\Z"
Digest = Annotated[str, msgspec.Meta(pattern=_DIGEST)]
Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_T = TypeVar("_T")


class _Record(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Immutable; camelCase on disk; what equals its default is left out."""


class Descriptor(_Record, frozen=True, kw_only=True):
    """Points to one blob of ``size`` bytes (image-spec descriptor.md)."""

    media_type: str
    digest: Digest
    size: Size
    artifact_type: str | None = None
    annotations: dict[str, str] = {}
    # Not ours; kept for the entries that other tools put into the same index.
    urls: list[str] = []
    data: str | None = None
    platform: dict[str, Any] | None = None

    @property
    def ref(self) -> str:
        """The name that the index gives it, or ""."""
        return self.annotations.get(REF_NAME, "")

    @property
    def kind(self) -> str:
        """One of KINDS, or "" for what is not an artifact of ours."""
        match = _KIND_TYPE.fullmatch(self.artifact_type or "")
        return match[1] if match and match[1] in KINDS else ""


class Manifest(_Record, frozen=True, kw_only=True):
    """One artifact: a config and layers (image-spec manifest.md)."""

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
    """What any manifest or index points to: all that garbage collection needs."""

    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] = ()
    manifests: tuple[Descriptor, ...] = ()


class LayoutMark(_Record, frozen=True, kw_only=True):
    """``oci-layout``: says that a folder is an OCI image layout."""

    image_layout_version: str


EMPTY_INDEX = Index(schema_version=2, media_type=INDEX_TYPE, manifests=())


def encode(record: msgspec.Struct) -> bytes:
    """JSON of ``record``; equal records give equal bytes."""
    return msgspec.json.encode(record, order="deterministic")


def decode(data: bytes, into: type[_T], path: Path, hint: str) -> _T:
    """Read ``data``, which is the content of ``path``; raise StoreDamaged with ``hint``."""
    try:
        return msgspec.json.decode(data, type=into)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StoreDamaged(f"{path} cannot be read: {error}", hint=hint) from error


def is_digest(text: str) -> bool:
    """Whether ``text`` is ``sha256:HEX``."""
    return re.match(_DIGEST, text) is not None


def digest_of(data: bytes) -> str:
    """``sha256:HEX`` of ``data``."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def artifact_type(kind: str) -> str:
    """The artifactType of ``kind``; raise InvalidInput."""
    if kind not in KINDS:
        raise InvalidInput(f"{kind!r} is not a kind of artifact", hint=f"use {', '.join(KINDS)}")
    return f"application/vnd.onecopy.{kind}.v1+json"


def manifest(
    kind: str,
    config: bytes,
    layers: Sequence[Descriptor],
    annotations: Mapping[str, str] | None = None,
) -> Manifest:
    """The manifest of one artifact. It bears no name and no date: same source, same digest."""
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
    """How the index names the manifest with the bytes ``data``; ``created`` is RFC 3339 UTC."""
    names: Mapping[str, str] = {REF_NAME: f"{ref.name}:{ref.version}", CREATED: created}
    return Descriptor(
        media_type=MANIFEST_TYPE,
        digest=digest_of(data),
        size=len(data),
        artifact_type=artifact_type(kind),
        annotations=dict(names),
    )
