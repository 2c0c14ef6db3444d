"""The values that the store takes and gives: artifacts and their layers.

Not here: their form on disk (oci.py).
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
    """The config record of an artifact; raise StoreDamaged, whose hint ends with ``remedy``."""
    try:
        return msgspec.json.decode(artifact.config, type=into)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StoreDamaged(
            f"the record of {artifact.ref} cannot be read: {error}",
            hint=f"`onecopy rm {artifact.ref}`, {remedy}",
        ) from error


class NewLayer(msgspec.Struct, frozen=True):
    """A layer to be stored: either the file ``path``, which is moved into the store, or the
    ``digest`` of a blob that is in the store already. ``size`` (bytes), if given, must hold.
    """

    path: Path | None
    media_type: str
    annotations: Mapping[str, str] = msgspec.field(default_factory=dict)
    digest: str | None = None
    size: int | None = None

    @classmethod
    def of(cls, layer: Layer, annotations: Mapping[str, str] | None = None) -> NewLayer:
        """A blob that the store has already, with its own annotations or others."""
        kept = layer.annotations if annotations is None else annotations
        return cls(None, layer.media_type, kept, layer.digest, layer.size)


class Layer(msgspec.Struct, frozen=True):
    """A stored blob; ``path`` is absolute, and nobody may write to it.

    ``size`` are the bytes of its content. In a trust domain the file is a page longer (domain.py).
    """

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str]
    path: Path
    domain: str = ""

    @property
    def blob_size(self) -> int:
        """Bytes of the file."""
        return self.size + (PAGE_SIZE if self.domain else 0)


class Artifact(msgspec.Struct, frozen=True):
    """A named segment, kernel or saved system.

    ``digest`` is its manifest's; ``created`` (RFC 3339, UTC) is when it got its name; ``config``
    is the JSON that build/ or guest/ wrote.
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
        """Bytes of all layers, holes and what other artifacts also list included."""
        return sum(layer.size for layer in self.layers)

    def layer(self, role: str) -> Layer:
        """The first layer annotated ``org.onecopy.role=ROLE``; raise StoreDamaged if none."""
        for layer in self.layers:
            if layer.annotations.get(ROLE) == role:
                return layer
        raise StoreDamaged(
            f"the {self.kind} {self.ref} has no {role!r} layer",
            hint=f"`onecopy rm {self.ref}`, then build or save it again",
        )
