"""Fills pools (pool.py): starts VMMs that wait, and ends those beyond a pool's size."""

from __future__ import annotations

from onecopy.guest.lifecycle import admission, pool, start
from onecopy.guest.lifecycle.launchplan import CloneSpec
from onecopy.guest.lifecycle.pool import Pool
from onecopy.guest.runtime import Runtime
from onecopy.linux.lock import locked
from onecopy.model import Reference
from onecopy.store import Artifact

_LOCK = ".pools.lock"


async def resize(host: Runtime, artifact: Artifact, size: int) -> Pool:
    """Set the size of a saved system's pool, and fill the pool.

    Args:
        size: The number of VMMs to keep ready; 0 removes the pool.

    Raises:
        InsufficientResources: The host has no memory for all of them.
        OnecopyError: Any error of a clone's start.
    """
    if size:
        source = start.plan_launch(host, _spec(artifact))
        missing = max(size - len(pool.ready(host, artifact)), 1)
        admission.require(admission.of_plan(source, missing).each, missing)
    pool.note(host, artifact.ref, size)
    await fill(host)
    return Pool(artifact.ref, size, tuple(pool.ready(host, artifact)))


async def fill(host: Runtime) -> None:
    """Start missing VMMs and end surplus ones; a lock admits one process at a time.

    After an error the VMMs that are ready stay.

    Raises:
        InsufficientResources: The host has no memory for all of them.
        OnecopyError: Any error of a clone's start.
    """
    async with locked(host.run / _LOCK):
        for artifact, size in pool.wanted(host).values():
            missing = size - len(pool.ready(host, artifact))
            if missing > 0:
                request = start.Request(_spec(artifact), missing, standby=True)
                await start.start(host, start.plan(host, request), refill=False)
        pool.trim(host)


def _spec(artifact: Artifact) -> CloneSpec:
    # By digest, because the name may get another content meanwhile.
    return CloneSpec(system=Reference(artifact.name, digest=artifact.digest))
