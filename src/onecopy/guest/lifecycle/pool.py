"""Pools: VMMs that have loaded a saved system and wait, so that a start takes less time.

A start then only resumes the guest and gives it an identity (launcher.py). A ready VMM has a run
directory and a lease like a guest, but no guest's name. The sizes of pools are in a file in the
directory of all run directories; a boot of the host removes it and ends the VMMs. When half of a
pool has been taken, a background process fills the pool again.

Not here: filling pools (pool_fill.py), taking a VMM from a pool (Runtime.taking).
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

#: The file with the sizes; it exists while there is a pool.
SIZES = ".pools.json"


class Pool(msgspec.Struct, frozen=True):
    """The pool of one saved system."""

    system: str
    """``NAME:VERSION``."""
    size: int
    """The number of VMMs to keep ready."""
    ready: tuple[GuestRecord, ...]
    """The VMMs that are ready."""


def pools(host: Runtime) -> list[Pool]:
    """Return all pools, by system; the pool of a removed or replaced system is empty."""
    current = {artifact.ref: artifact for artifact, _ in wanted(host).values()}
    return [
        Pool(ref, size, tuple(ready(host, current[ref])) if ref in current else ())
        for ref, size in sorted(_sizes(host).items(), key=lambda item: in_order(item[0]))
    ]


def trim(host: Runtime) -> None:
    """End ready VMMs of removed or replaced systems, and those beyond the size of their pool."""
    left = {digest: size for digest, (_, size) in wanted(host).items()}
    unwanted = []
    for record in host.prepared():
        left[record.digest] = left.get(record.digest, 0) - 1
        if left[record.digest] < 0:
            unwanted.append(record)
    if unwanted:
        host.end(*unwanted)


def remove(host: Runtime, ref: Reference) -> None:
    """Remove the pool of a system before the system is removed, unless guests use the system."""
    with contextlib.suppress(NotFound, StoreDamaged):
        artifact = host.store.resolve(ref, "system")
        if all(user.startswith(POOL) for user in host.store.users(artifact.digest)):
            note(host, artifact.ref, 0)
            host.end(*ready(host, artifact))


def refill(host: Runtime) -> None:
    """Start a background process that fills all pools, if half of one has been taken."""
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
    # Otherwise Popen would warn that the process is still running.
    process.returncode = 0
    child_reaper.adopt(process.pid)


def wanted(host: Runtime) -> dict[str, tuple[Artifact, int]]:
    """Return digest of a saved system -> the system, and the number of VMMs to keep ready."""
    found: dict[str, tuple[Artifact, int]] = {}
    for ref, size in _sizes(host).items():
        try:
            artifact = host.store.resolve(Reference.parse(ref), "system")
        except NotFound:
            continue
        # A system may have several names, each with a pool.
        _, others = found.get(artifact.digest, (artifact, 0))
        found[artifact.digest] = artifact, size + others
    return found


def _sizes(host: Runtime) -> dict[str, int]:
    """Return reference of a saved system -> the size of its pool."""
    try:
        return msgspec.json.decode((host.run / SIZES).read_bytes(), type=dict[str, int])
    except FileNotFoundError:
        return {}


def note(host: Runtime, ref: str, size: int) -> None:
    """Record the size of a system's pool; 0 removes the pool."""
    path = host.run / SIZES
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
    """Return the ready VMMs of a saved system."""
    return [record for record in host.prepared() if record.digest == artifact.digest]
