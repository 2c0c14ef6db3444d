"""The values that the store accepts and returns: artifacts and their layers.

Not here: their format on disk (oci.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from onecopy.errors import StoreDamaged
from onecopy.model import PAGE_SIZE
from onecopy.store.oci import ROLE

_T = TypeVar("_T")


def decode_config(artifact: Artifact, into: type[_T], remedy: str) -> _T:
    """Decode the config record of an artifact.

    Args:
        into: the type of the record.
        remedy: what to do after removing a damaged artifact; completes the hint.

    Raises:
        StoreDamaged: the record is not valid.
    """
    try:
        return msgspec.json.decode(artifact.config, type=into)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StoreDamaged(
            f"the record of {artifact.ref} is not valid: {error}",
            hint=f"`onecopy rm {artifact.ref}`, {remedy}",
        ) from error


class NewLayer(msgspec.Struct, frozen=True):
    """A layer to store: a file that is moved into the store, or a blob of the store.

    Attributes:
        path: the file, or None.
        digest: the digest of the blob, or None.
        size: the expected size in bytes, or None.
    """

    path: Path | None
    media_type: str
    annotations: Mapping[str, str] = msgspec.field(default_factory=dict)
    digest: str | None = None
    size: int | None = None

    @classmethod
    def of(cls, layer: Layer, annotations: Mapping[str, str] | None = None) -> NewLayer:
        """Make a layer of a stored blob, with its annotations or others."""
        chosen = layer.annotations if annotations is None else annotations
        return cls(None, layer.media_type, chosen, layer.digest, layer.size)


class Layer(msgspec.Struct, frozen=True):
    """A stored blob.

    Attributes:
        path: its absolute path; nobody may write to the file.
        size: the bytes of its content. In a trust domain the file is a page longer (domain.py).
    """

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str]
    path: Path
    domain: str = ""

    @property
    def blob_size(self) -> int:
        """The size of the file in bytes."""
        return self.size + (PAGE_SIZE if self.domain else 0)


class Artifact(msgspec.Struct, frozen=True):
    """A named segment, kernel or saved system.

    Attributes:
        digest: the digest of its manifest.
        created: when it got its name (RFC 3339, UTC).
        config: JSON that images/ or guest/ wrote.
    """

    kind: str
    name: str
    version: str
    digest: str
    created: str
    config: bytes
    layers: tuple[Layer, ...]

    @property
    def ref(self) -> str:
        """``NAME:VERSION``."""
        return f"{self.name}:{self.version}"

    @property
    def size(self) -> int:
        """The bytes of all layers, including holes and layers that other artifacts share."""
        return sum(layer.size for layer in self.layers)

    def layer(self, role: str) -> Layer:
        """Return the first layer annotated ``org.onecopy.role=ROLE``.

        Raises:
            StoreDamaged: there is no such layer.
        """
        for layer in self.layers:
            if layer.annotations.get(ROLE) == role:
                return layer
        raise StoreDamaged(
            f"the {self.kind} {self.ref} has no {role!r} layer",
            hint=f"`onecopy rm {self.ref}`, then build or save it again",
        )
