"""Letting a guest stand still for a moment, in a state that can be copied.

First the file systems of a segment are frozen (FIFREEZE: what is written is on the device, and
whoever writes waits), then the processors are stopped. Whoever is killed meanwhile leaves a mark;
the next command lets the guest go on (resume.py), and its own watchdog thaws the file systems.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator

import msgspec

from onecopy.errors import GuestFailed, NotFound, OnecopyError
from onecopy.guest import guest_script
from onecopy.guest.run_directory import RunDirectory
from onecopy.linux.lock import locked_within
from onecopy.vmm.monitor import GRACE, TIMEOUT, Monitor, connect

#: Seconds after which the guest thaws by itself.
_WATCHDOG = 60
_TIMEOUT = 30.0
#: Seconds that thawing may take for who does not want to wait: the guest would do it by itself.
_THAWING = 1.0
#: Seconds that another command may let the guest stand still.
_WAITING = 60.0


class _Run(msgspec.Struct, frozen=True):
    """query-status."""

    running: bool


@contextlib.asynccontextmanager
async def paused(folder: RunDirectory, segment: str) -> AsyncIterator[None]:
    """Let the guest stand still; raises GuestFailed, AgentFailed.

    It also raises GuestFailed at the end if the file systems were not frozen all the time.
    """
    frozen = await guest_script.segment(
        folder.path, "freeze", segment, str(_WATCHDOG), timeout=_TIMEOUT
    )
    try:
        if frozen.exit_code:
            raise GuestFailed(
                f"{folder.name} could not freeze {segment}: {guest_script.said(frozen)}"
            )
        async with stopped(folder):
            yield
    except BaseException as error:
        # If the guest is gone there is nothing to thaw, and the first error is the one to tell.
        seconds = _TIMEOUT if isinstance(error, Exception) else _THAWING
        with contextlib.suppress(OnecopyError):
            await guest_script.segment(folder.path, "thaw", segment, timeout=seconds)
        raise
    thawed = await guest_script.segment(folder.path, "thaw", segment, timeout=_TIMEOUT)
    if thawed.exit_code:
        raise GuestFailed(
            f"{folder.name} did not keep {segment} frozen; nothing was stored: "
            f"{guest_script.said(thawed)}",
            hint="try again when the guest has less to do",
        )


@contextlib.asynccontextmanager
async def stopped(folder: RunDirectory, *, go_on: bool = True) -> AsyncIterator[Monitor]:
    """Let the guest's processors stand still, and no other command speak to its VMM.

    Raises GuestFailed. If the guest cannot be told to go on the next command does that.
    """
    async with _marked(folder) as mark, connect(folder.path / "monitor.sock") as monitor:
        running = (await monitor.ask("query-status", _Run)).running
        went_on, seconds = True, TIMEOUT
        try:
            await monitor.execute("stop")
            yield monitor
        except BaseException:
            seconds = GRACE
            raise
        finally:
            if running and go_on:
                went_on = await _told(monitor, seconds)
            if not went_on:
                mark.pop_all()


async def _told(monitor: Monitor, seconds: float) -> bool:
    """Let a guest go on; whether QEMU has taken that."""
    with contextlib.suppress(GuestFailed):
        await monitor.execute("cont", timeout=seconds)
        return True
    return False


@contextlib.asynccontextmanager
async def _marked(folder: RunDirectory) -> AsyncIterator[contextlib.ExitStack]:
    """Have the mark of a guest that is to go on, and that no other command has; gone at the end.

    What this yields is to be emptied if the mark has to stay.
    """
    mark = folder.path / "paused"
    late = GuestFailed(
        f"another command has let {folder.name} stand still for {_WAITING:g} s",
        hint="try again when it has ended",
    )
    async with locked_within(mark, _WAITING, late):
        with contextlib.ExitStack() as removal:
            removal.callback(mark.unlink, missing_ok=True)
            yield removal


@contextlib.contextmanager
def copying(name: str) -> Iterator[None]:
    """Raise GuestFailed if the guest ends while its memory is copied (linux/cow_pages.py)."""
    try:
        yield
    except NotFound as error:
        raise GuestFailed(
            f"{name} ended meanwhile; nothing was stored", hint="`onecopy ps`"
        ) from error
