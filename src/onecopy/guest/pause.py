"""Letting a guest stand still for a moment, in a state that can be copied.

First the file systems of a segment are frozen (FIFREEZE: what is written is on the device, and
whoever writes waits), then the processors are stopped. Whoever is killed meanwhile leaves a mark;
the next command lets the guest go on (resuming.py), and its own watchdog thaws the file systems.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator

from onecopy.errors import GuestFailed, NotFound, OnecopyError
from onecopy.guest import script
from onecopy.guest.exec import Completed
from onecopy.guest.folder import GuestFolder
from onecopy.host.lock import locked
from onecopy.vmm.monitor import Monitor, connect

#: Seconds after which the guest thaws by itself.
_WATCHDOG = 60
_TIMEOUT = 30.0


@contextlib.asynccontextmanager
async def paused(folder: GuestFolder, segment: str) -> AsyncIterator[None]:
    """Let the guest stand still; raises GuestFailed, AgentFailed.

    It also raises GuestFailed at the end if the file systems were not frozen all the time.
    """
    frozen = await script.segment(folder.path, "freeze", segment, str(_WATCHDOG), timeout=_TIMEOUT)
    try:
        if frozen.exit_code:
            raise GuestFailed(f"{folder.name} could not freeze {segment}: {_said(frozen)}")
        async with stopped(folder):
            yield
    except BaseException:
        # If the guest is gone there is nothing to thaw, and the first error is the one to tell.
        with contextlib.suppress(OnecopyError):
            await script.segment(folder.path, "thaw", segment, timeout=_TIMEOUT)
        raise
    thawed = await script.segment(folder.path, "thaw", segment, timeout=_TIMEOUT)
    if thawed.exit_code:
        raise GuestFailed(
            f"{folder.name} did not keep {segment} frozen; nothing was stored: {_said(thawed)}",
            hint="try again when the guest has less to do",
        )


def _said(done: Completed) -> str:
    return done.stderr.decode(errors="replace").strip()


@contextlib.asynccontextmanager
async def stopped(folder: GuestFolder, *, go_on: bool = True) -> AsyncIterator[Monitor]:
    """Let the guest's processors stand still, and no other command speak to its VMM.

    Raises GuestFailed.
    """
    async with locked(folder.path / "paused"):
        try:
            async with connect(folder.path / "monitor.sock") as monitor:
                running = (await monitor.execute("query-status"))["running"]
                await monitor.execute("stop")
                try:
                    yield monitor
                finally:
                    if running and go_on:
                        with contextlib.suppress(GuestFailed):
                            await monitor.execute("cont")
        finally:
            (folder.path / "paused").unlink(missing_ok=True)


@contextlib.contextmanager
def copying(name: str) -> Iterator[None]:
    """Raise GuestFailed if the guest ends while its memory is copied (host/private.py)."""
    try:
        yield
    except NotFound as error:
        raise GuestFailed(
            f"{name} ended meanwhile; nothing was stored", hint="`onecopy ps`"
        ) from error
