"""Freezes a guest's programs for a snapshot; a clone thaws them when it has its own identity.

Until then no saved program runs under another guest's name and clock. The program that gives clones
their identity freezes and thaws (images/files/freezer.c). It also stops calendar timers and finds
open TCP connections. If the host no longer answers, the guest thaws by itself. Not here: stopping
the guest's processors (guest/pause.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from onecopy.errors import GuestFailed, OnecopyError
from onecopy.guest import identity
from onecopy.images.skipped import SKIPPED
from onecopy.vmm.monitor import GRACE
from onecopy.vmm.port_pipe import Pipe

#: Seconds after which a guest thaws by itself (images/files/identity.c), less a margin.
_DEADLINE = 18.0
#: Seconds for the guest to stop timers and programs.
_TIMEOUT = 120.0

_LACKING = {
    "nothing": "the freezing of programs, for which the guest's kernel has no control groups: what "
    "is due runs in clones before they have their names",
    "connections": "the reset of TCP connections, for which the guest's kernel has no INET_DIAG: "
    "those that are open now hang in clones",
}

Still = Callable[[], None]


@contextlib.asynccontextmanager
async def frozen(
    folder: Path, tell: Callable[[str], None], *, last: bool = False
) -> AsyncIterator[Still]:
    """Keep the guest's programs frozen during the block.

    Args:
        folder: The guest's run directory.
        tell: Called with a line for each feature that clones will lack.
        last: Leave the programs frozen after the block, because the guest ends then.

    Yields:
        A function that raises GuestFailed if the guest may have thawed by itself.

    Raises:
        AgentFailed, GuestFailed: The guest did not freeze.
    """
    with Pipe(folder, "identity") as pipe:
        pipe.drain()
        seconds = _TIMEOUT
        try:
            asked = await _freeze(pipe, tell)

            def still() -> None:
                if time.monotonic() - asked > _DEADLINE:
                    raise GuestFailed(
                        f"{folder.name} did not stop within {_DEADLINE:g} s, and its programs "
                        "continued",
                        hint="try again when the host is less busy",
                    )

            yield still
        except BaseException as error:
            # The first error must reach the caller, so later ones are suppressed.
            seconds = _TIMEOUT if isinstance(error, Exception) else GRACE
            raise
        finally:
            # With ``last`` the caller ends the guest, also after an error.
            if not last:
                await _thaw(pipe, seconds)


async def _freeze(pipe: Pipe, tell: Callable[[str], None]) -> float:
    """Freeze the programs; return the time of the request that counts, by time.monotonic()."""
    await identity.ask(pipe, "freeze", "frozen", _TIMEOUT)
    # A second request takes no time, and restarts the time limit in the guest.
    asked = time.monotonic()
    for lacking in (await identity.ask(pipe, "freeze", "frozen", _TIMEOUT)).split():
        if lacking in _LACKING:
            tell(f"{SKIPPED}{_LACKING[lacking]}")
    return asked


async def _thaw(pipe: Pipe, seconds: float) -> None:
    """Thaw the programs; a guest that does not get the request thaws by itself."""
    with contextlib.suppress(TimeoutError, OnecopyError):
        async with asyncio.timeout(seconds):
            await identity.ask(pipe, "thaw", "thawed", seconds)
