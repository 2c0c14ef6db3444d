"""Fill pools (pool.py): start VMMs that wait, and end those that nobody wants any more."""

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
    """Give a saved system a pool of ``size``, and fill it; 0 for none.

    Raises InsufficientResources if there is no memory for all of it, and what starting a clone
    raises.
    """
    if size:
        source = start.plan_launch(host, _spec(artifact))
        missing = max(size - len(pool.ready(host, artifact)), 1)
        admission.require(admission.of_plan(source, missing).each, missing)
    pool.note(host, artifact.ref, size)
    await fill(host)
    return Pool(artifact.ref, size, tuple(pool.ready(host, artifact)))


async def fill(host: Runtime) -> None:
    """Prepare what is missing, and end what nobody wants any more; one process at a time does.

    Raises InsufficientResources, and what starting a clone raises; what is prepared by then stays.
    """
    async with locked(host.run / _LOCK):
        for artifact, size in pool.wanted(host).values():
            missing = size - len(pool.ready(host, artifact))
            if missing > 0:
                request = start.Request(_spec(artifact), missing, standby=True)
                await start.start(host, start.plan(host, request), refill=False)
        pool.trim(host)


def _spec(artifact: Artifact) -> CloneSpec:
    # By its digest: its name may come to mean another one meanwhile.
    return CloneSpec(system=Reference(artifact.name, digest=artifact.digest))
