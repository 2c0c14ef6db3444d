"""Pools: VMMs that have loaded a saved system and wait, so that a start need not.

What is left of a start is to let the guest run and give it an identity (restore.py). A prepared VMM
has a run folder and a lease like a guest, but no guest's name. Pools have a size, which is noted in
the run folder of all guests: like the VMMs it is gone when the host is booted. Once half of a pool
has been taken, a process in the background fills it again.

Not here: taking one (Runtime.taking).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys

import msgspec

from onecopy.errors import NotFound, StoreDamaged
from onecopy.guest.lifecycle import admission, batch, restore
from onecopy.guest.run_directory import POOL, GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.linux import child_reaper, files
from onecopy.linux.lock import locked
from onecopy.model import Reference, in_order
from onecopy.store import Artifact

_SIZES = ".pools.json"
_LOCK = ".pools.lock"


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
    current = {artifact.ref: artifact for artifact, _ in _wanted(host).values()}
    return [
        Pool(ref, size, tuple(_of(host, current[ref])) if ref in current else ())
        for ref, size in sorted(_sizes(host).items(), key=lambda item: in_order(item[0]))
    ]


async def resize(host: Runtime, artifact: Artifact, size: int) -> Pool:
    """Give a saved system a pool of ``size``, and fill it; 0 for none.

    Raises InsufficientResources if there is no memory for all of it, and what starting a clone
    raises.
    """
    if size:
        source = restore.template(host, artifact)
        missing = max(size - _ready(host, artifact), 1)
        admission.require(admission.of_clones(source.accel.name, missing).each, missing)
    _note(host, artifact.ref, size)
    await fill(host)
    return Pool(artifact.ref, size, tuple(_of(host, artifact)))


async def fill(host: Runtime) -> None:
    """Prepare what is missing, and end what nobody wants any more; one process at a time does.

    Raises InsufficientResources, and what starting a clone raises; what is prepared by then stays.
    """
    async with locked(host.run / _LOCK):
        wanted = _wanted(host)
        for artifact, size in wanted.values():
            missing = size - _ready(host, artifact)
            if missing > 0:
                await _prepare(host, artifact, missing)
        trim(host)


async def _prepare(host: Runtime, artifact: Artifact, count: int) -> None:
    source = restore.template(host, artifact)
    need = admission.of_clones(source.accel.name, count)
    spec = restore.CloneSpec(translated=need.translated)
    await batch.start_many(
        host,
        [f"{POOL}{secrets.token_hex(4)}" for _ in range(count)],
        lambda name, batch: restore.prepare_clone(host, source, name, batch, spec),
        each=need.each,
    )


def trim(host: Runtime) -> None:
    """End what is prepared of systems that were removed or replaced, and what is too many."""
    left = {digest: size for digest, (_, size) in _wanted(host).items()}
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
            _note(host, artifact.ref, 0)
            host.end(*_of(host, artifact))


def refill(host: Runtime) -> None:
    """Have pools filled, by a process that outlives this one, if half of one has been taken."""
    if not any(_ready(host, artifact) * 2 <= size for artifact, size in _wanted(host).values()):
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


def _wanted(host: Runtime) -> dict[str, tuple[Artifact, int]]:
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


def _note(host: Runtime, ref: str, size: int) -> None:
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


def _of(host: Runtime, artifact: Artifact) -> list[GuestRecord]:
    return [record for record in host.prepared() if record.digest == artifact.digest]


def _ready(host: Runtime, artifact: Artifact) -> int:
    return len(_of(host, artifact))
