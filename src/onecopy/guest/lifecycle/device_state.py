"""The state of a saved system's devices, checked: QEMU trusts what it reads there.

Not here: how it is written (snapshot.py), how QEMU loads it (vmm/monitor.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator

from onecopy.errors import StoreDamaged
from onecopy.guest.lifecycle.snapshot import STATE_ROOM
from onecopy.linux import memfd
from onecopy.store import Artifact


@contextlib.contextmanager
def checked(artifact: Artifact) -> Iterator[int]:
    """A descriptor of the very bytes that were checked, which nobody can change any more.

    Raises StoreDamaged unless they are what was saved.
    """
    layer = artifact.layer("state")
    hint = f"`onecopy rm {artifact.ref}`, then save it again"
    try:
        with layer.path.open("rb", buffering=0) as file:
            # One more than there can be, and what a trust domain adds (store/domain.py).
            content = file.read(2 * STATE_ROOM)
    except OSError as error:
        raise StoreDamaged(
            f"the device state of {artifact.ref} cannot be read: {error.strerror}", hint=hint
        ) from error
    if f"sha256:{hashlib.sha256(content).hexdigest()}" != layer.digest:
        raise StoreDamaged(
            f"the device state of {artifact.ref} is not what was saved: {layer.path} was changed",
            hint=hint,
        )
    state = memfd.create_sealed("onecopy-state", content)
    try:
        yield state
    finally:
        os.close(state)
