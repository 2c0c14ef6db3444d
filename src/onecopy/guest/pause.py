"""Pauses a guest for a moment, in a state that can be copied.

First the guest freezes the file systems of a segment: FIFREEZE writes all data to the device and
blocks writers. Then QEMU stops the vCPUs. If the command is killed, its mark stays. Then the next
command resumes the guest (resume.py), and a watchdog in the guest thaws the file systems.
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

#: Seconds after which the guest thaws on its own.
_WATCHDOG = 60
_TIMEOUT = 30.0
#: Seconds for a thaw after an interrupt. The watchdog does it otherwise.
_THAWING = 1.0
#: Seconds to wait while another command has the guest paused.
_WAITING = 60.0


class _Run(msgspec.Struct, frozen=True):
    """The answer of query-status."""

    running: bool


@contextlib.asynccontextmanager
async def paused(folder: RunDirectory, segment: str) -> AsyncIterator[None]:
    """Pause the guest in the block, with the file systems of ``segment`` frozen.

    Raises:
        GuestFailed: The guest cannot be paused, or a file system thawed before the end.
        AgentFailed: The agent failed or did not answer.
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
        # A guest that is gone needs no thaw. The first error matters.
        seconds = _TIMEOUT if isinstance(error, Exception) else _THAWING
        with contextlib.suppress(OnecopyError):
            await guest_script.segment(folder.path, "thaw", segment, timeout=seconds)
        raise
    thawed = await guest_script.segment(folder.path, "thaw", segment, timeout=_TIMEOUT)
    if thawed.exit_code:
        raise GuestFailed(
            f"{folder.name} did not keep {segment} frozen, so nothing was stored: "
            f"{guest_script.said(thawed)}",
            hint="try again when the guest is less busy",
        )


@contextlib.asynccontextmanager
async def stopped(folder: RunDirectory, *, go_on: bool = True) -> AsyncIterator[Monitor]:
    """Stop the guest's vCPUs in the block, and keep other commands from its monitor.

    If QEMU does not resume the guest at the end, the next command does.

    Args:
        folder: The guest's run directory.
        go_on: Whether to resume the guest at the end.

    Raises:
        GuestFailed: QEMU failed, or another command has the guest paused.
    """
    async with _marked(folder) as mark, connect(folder.path) as monitor:
        running = (await monitor.ask("query-status", _Run)).running
        resumed, seconds = True, TIMEOUT
        try:
            await monitor.execute("stop")
            yield monitor
        except BaseException:
            seconds = GRACE
            raise
        finally:
            if running and go_on:
                resumed = await _resume(monitor, seconds)
            if not resumed:
                mark.pop_all()


async def _resume(monitor: Monitor, seconds: float) -> bool:
    """Resume a guest; return whether QEMU confirmed it."""
    with contextlib.suppress(GuestFailed):
        await monitor.execute("cont", timeout=seconds)
        return True
    return False


@contextlib.asynccontextmanager
async def _marked(folder: RunDirectory) -> AsyncIterator[contextlib.ExitStack]:
    """Hold the mark of a paused guest; remove it at the end.

    The caller empties the stack that this yields to leave the mark, so that the guest is resumed.
    """
    mark = folder.path / "paused"
    late = GuestFailed(
        f"another command has kept {folder.name} paused for {_WAITING:g} s",
        hint="try again when that command has ended",
    )
    async with locked_within(mark, _WAITING, late):
        with contextlib.ExitStack() as removal:
            removal.callback(mark.unlink, missing_ok=True)
            yield removal


@contextlib.contextmanager
def copying(name: str) -> Iterator[None]:
    """Turn NotFound into GuestFailed: the guest ended while its memory was copied."""
    try:
        yield
    except NotFound as error:
        raise GuestFailed(
            f"{name} ended during the copy, so nothing was stored",
            hint="see `onecopy ps --all` for the reason",
        ) from error
