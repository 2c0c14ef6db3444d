"""Give a verified, immutable copy of a layer to a reader that trusts its input."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator

from onecopy.errors import StoreDamaged
from onecopy.linux import memfd
from onecopy.store.artifact import Artifact


@contextlib.contextmanager
def sealed_layer(artifact: Artifact, role: str, what: str, most: int) -> Iterator[int]:
    """Verify a layer's digest and yield a descriptor of a sealed memory file with its bytes.

    Args:
        artifact: the artifact of the layer.
        role: the layer's role.
        what: the layer's name in errors.
        most: the number of bytes that the layer can have at most.

    Raises:
        StoreDamaged: the bytes are not the stored ones, or cannot be read.
    """
    layer = artifact.layer(role)
    hint = f"`onecopy rm {artifact.ref}`, then save it again"
    try:
        with layer.path.open("rb", buffering=0) as file:
            content = file.read(most)
    except OSError as error:
        raise StoreDamaged(
            f"{what} of {artifact.ref} cannot be read: {error.strerror}", hint=hint
        ) from error
    if f"sha256:{hashlib.sha256(content).hexdigest()}" != layer.digest:
        raise StoreDamaged(
            f"{what} of {artifact.ref} differs from what was saved: {layer.path} was modified",
            hint=hint,
        )
    sealed = memfd.create_sealed(f"onecopy-{role}", content)
    try:
        yield sealed
    finally:
        os.close(sealed)
