"""Pools: VMMs that have loaded a saved system and wait, so that a start need not.

What is left of a start is to let the guest run and give it an identity (launcher.py). A prepared
VMM has a run folder and a lease like a guest, but no guest's name. Pools have a size, which is
noted in the run folder of all guests: like the VMMs it is gone when the host is booted. Once half
of a pool has been taken, a process in the background fills it again.

Not here: preparing them (pool_fill.py), taking one (Runtime.taking).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import msgspec

from onecopy.errors import NotFound, StoreDamaged
from onecopy.guest.run_directory import POOL, GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.linux import child_reaper, files
from onecopy.model import Reference, in_order
from onecopy.store import Artifact

_SIZES = ".pools.json"


class Pool(msgspec.Struct, frozen=True):
    """What is prepared of one saved system."""

    system: str
    """``NAME:VERSION``."""
    size: int
    """How many are wanted."""
    ready: tuple[GuestRecord, ...]
    """Those that there are."""


def pools(host: Runtime) -> list[Pool]:
    """All pools, by system; of one that was removed or replaced nothing is ready."""
    current = {artifact.ref: artifact for artifact, _ in wanted(host).values()}
    return [
        Pool(ref, size, tuple(ready(host, current[ref])) if ref in current else ())
        for ref, size in sorted(_sizes(host).items(), key=lambda item: in_order(item[0]))
    ]


def trim(host: Runtime) -> None:
    """End what is prepared of systems that were removed or replaced, and what is too many."""
    left = {digest: size for digest, (_, size) in wanted(host).items()}
    unwanted = []
    for record in host.prepared():
        left[record.digest] = left.get(record.digest, 0) - 1
        if left[record.digest] < 0:
            unwanted.append(record)
    if unwanted:
        host.end(*unwanted)


def remove(host: Runtime, ref: Reference) -> None:
    """Give up the pool of a system that is to be removed, if no guest uses that."""
    with contextlib.suppress(NotFound, StoreDamaged):
        artifact = host.store.resolve(ref, "system")
        if all(user.startswith(POOL) for user in host.store.users(artifact.digest)):
            note(host, artifact.ref, 0)
            host.end(*ready(host, artifact))


def refill(host: Runtime) -> None:
    """Have pools filled, by a process that outlives this one, if half of one has been taken."""
    if not any(len(ready(host, artifact)) * 2 <= size for artifact, size in wanted(host).values()):
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "onecopy", "pool", "--fill"],
        env={**os.environ, "ONECOPY_HOME": str(host.store.root)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    # Popen would warn that it is still running.
    process.returncode = 0
    child_reaper.adopt(process.pid)


def wanted(host: Runtime) -> dict[str, tuple[Artifact, int]]:
    """Digest of a saved system -> it, and how many are wanted."""
    found: dict[str, tuple[Artifact, int]] = {}
    for ref, size in _sizes(host).items():
        try:
            artifact = host.store.resolve(Reference.parse(ref), "system")
        except NotFound:
            continue
        # It may have several names.
        _, others = found.get(artifact.digest, (artifact, 0))
        found[artifact.digest] = artifact, size + others
    return found


def _sizes(host: Runtime) -> dict[str, int]:
    """Reference of a saved system -> the size of its pool."""
    try:
        return msgspec.json.decode((host.run / _SIZES).read_bytes(), type=dict[str, int])
    except FileNotFoundError:
        return {}


def note(host: Runtime, ref: str, size: int) -> None:
    """Note the size of a system's pool; 0 for none."""
    path = host.run / _SIZES
    with host.locked():
        sizes = _sizes(host)
        sizes.pop(ref, None)
        if size:
            sizes[ref] = size
        if not sizes:
            path.unlink(missing_ok=True)
            return
        files.replace(path, msgspec.json.encode(sizes))


def ready(host: Runtime, artifact: Artifact) -> list[GuestRecord]:
    """What is prepared of a saved system."""
    return [record for record in host.prepared() if record.digest == artifact.digest]
