"""Stopping guests: ask, wait, kill, clean up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from enum import Enum

from onecopy.build.bootfiles import TOOLS_MOUNTPOINT
from onecopy.errors import OnecopyError
from onecopy.guest.exec import run_captured
from onecopy.guest.folder import GuestFolder, GuestRecord
from onecopy.guest.host import Host
from onecopy.guest.many import turns
from onecopy.host import process
from onecopy.vmm.agent import Agent
from onecopy.vmm.reply import Nothing

#: Seconds that a guest gets to shut down by itself.
PATIENCE = 10.0
#: Seconds within which a live agent takes the request.
_ASKING = 3.0
#: Seconds that each of several guests adds for all: they share the host's processors.
_SHARE = 0.04
#: Seconds after which a guest that still shuts down lets the next one begin.
_TURN = 2.0
_SYNC = [f"{TOOLS_MOUNTPOINT}/bin/busybox", "sync"]


class Ending(Enum):
    """How a guest was stopped, as it is told."""

    SHUT_DOWN = "shut down"
    """By itself."""
    UNASKED = "was ended"
    DEAF = "was ended: it did not answer"
    LATE = "was ended: it did not shut down in time"
    WAITING = "was ended: the time was over before its turn came"


async def stop_guests(
    host: Host, records: Sequence[GuestRecord], patience: float = PATIENCE
) -> list[Ending]:
    """Stop guests; return how each of them ended.

    ``patience`` (seconds) is how long one may take to shut down; all together get 0.04 s more for
    each, and those with disks their time whatever the others take. 0 ends them unasked, and so is a
    bare machine, which hears nothing.
    """
    turn, over = turns(), time.monotonic() + patience + _SHARE * (len(records) - 1)

    async def one(record: GuestRecord) -> Ending:
        if patience <= 0 or not record.agent:
            return Ending.UNASKED
        async with turn:
            until = time.monotonic() + patience
            if not record.disks:  # else there is something to lose
                until = min(until, over)
            if until <= time.monotonic():
                return Ending.WAITING
            if not await _ask(GuestFolder(host.run / record.name)):
                return Ending.DEAF
            await wait_for_end(record, min(_TURN, _left(until)))
        return Ending.SHUT_DOWN if await wait_for_end(record, _left(until)) else Ending.LATE

    endings = await asyncio.gather(*map(one, records), return_exceptions=True)
    # Whatever became of asking one of them: all of them end.
    host.end(*records)
    return [_known(each) for each in endings]


def _known(ending: Ending | BaseException) -> Ending:
    if isinstance(ending, BaseException):
        raise ending
    return ending


def _left(until: float) -> float:
    return max(until - time.monotonic(), 0)


async def sync_disks(host: Host, record: GuestRecord) -> None:
    """Let a guest write what it has for its disks, before it is ended unasked."""
    if record.disks:
        with contextlib.suppress(OnecopyError):
            await run_captured(host.run / record.name, _SYNC, timeout=PATIENCE)


async def _ask(folder: GuestFolder) -> bool:
    """Have the guest shut down (build/files/stop); whether it heard, whatever it says else."""
    argv = ["setsid", "sh", f"{TOOLS_MOUNTPOINT}/stop"]
    path = f"{TOOLS_MOUNTPOINT}/bin/busybox"
    with contextlib.suppress(OnecopyError):
        await Agent(folder.path).call("guest-exec", Nothing, path=path, arg=argv, timeout=_ASKING)
        return True
    return False


async def wait_for_end(record: GuestRecord, patience: float | None = None) -> bool:
    """Wait up to ``patience`` seconds until a guest has ended; return whether it has."""
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return True
    try:
        same = process.is_same(record.pid, record.start_ticks)
        return not same or await process.wait_for_end(pidfd, patience)
    finally:
        os.close(pidfd)
