"""A layer's very bytes in a memory file, checked, for a reader that trusts what it reads."""

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
    """A descriptor of the very bytes of a layer that were checked, which nobody can change.

    ``what`` names it in errors; it has no more than ``most`` bytes. Raises StoreDamaged unless they
    are what was stored.
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
            f"{what} of {artifact.ref} is not what was saved: {layer.path} was changed",
            hint=hint,
        )
    sealed = memfd.create_sealed(f"onecopy-{role}", content)
    try:
        yield sealed
    finally:
        os.close(sealed)
