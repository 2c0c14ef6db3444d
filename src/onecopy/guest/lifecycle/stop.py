"""Stopping guests: ask, wait, kill, clean up.

Not here: what a guest does when it is asked (images/files/stop), the time that it has
(guest/fair_time.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Sequence
from enum import Enum

import msgspec

from onecopy.errors import OnecopyError
from onecopy.guest.exec import run_captured
from onecopy.guest.fair_time import FairTime
from onecopy.guest.lifecycle.batch import turns
from onecopy.guest.run_directory import GuestRecord, RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.images.initramfs import TOOLS_MOUNTPOINT
from onecopy.linux import process
from onecopy.vmm import logs
from onecopy.vmm.agent import Agent
from onecopy.vmm.guest_reply import Nothing

#: Seconds that a guest gets to shut down by itself.
PATIENCE = 10.0
#: Seconds within which a live agent takes the request.
_ASKING = 3.0
#: Seconds that a guest gets besides: to end when the time of its programs is over, which it counts,
#: and if it has told that, to kill them and to write back what is theirs.
_GRACE, _FINISHING = 1.0, 10.0
_SYNC = [f"{TOOLS_MOUNTPOINT}/bin/busybox", "sync"]
#: What guests say on their consoles of programs that were killed: files/programs, and systemd.
_LEFT = re.compile(r"onecopy: did not end in time: ([0-9]{1,6}): ([ -~]{1,200})")
_KILLED = re.compile(r"systemd-shutdown\[1\]: Sending SIGKILL to PID [0-9]{1,7} \(([ -~]{1,64}?)\)")


class Ending(Enum):
    """How a guest was stopped, as it is told."""

    SHUT_DOWN = "shut down"
    """By itself, and so did all of its programs."""
    UNASKED = "was ended"
    DEAF = "was ended: it did not answer"
    LATE = "was ended: it did not shut down in time"
    KILLED = "was ended: not all programs ended in time"
    """It killed them, and shut down then."""


class Stopped(msgspec.Struct, frozen=True):
    """How a guest was stopped."""

    how: Ending
    programs: str = ""
    """Names of some of the programs that had not ended, and how many there were."""

    @property
    def text(self) -> str:
        """A clause about the guest."""
        return f"{self.how.value} ({self.programs})" if self.programs else self.how.value


async def stop_guests(
    host: Runtime, records: Sequence[GuestRecord], patience: float = PATIENCE
) -> list[Stopped]:
    """Stop guests; return how each of them ended.

    ``patience`` (seconds) is how long one may take to shut down, from when it was asked: those that
    keep the host's processors busy are asked in turn. 0 ends them unasked, and so ends a bare
    machine, which hears nothing. Cancelled, it ends nobody; what was asked goes on shutting down.
    """
    turn = turns()

    async def one(record: GuestRecord) -> Stopped:
        if patience <= 0 or not record.agent:
            return Stopped(Ending.UNASKED)
        return await _Stopping(host, record, patience).run(turn)

    with host.ending(*records):
        endings = await asyncio.gather(*map(one, records), return_exceptions=True)
        # Whatever became of asking one of them: all of them end.
        host.end(*records)
    return [_known(each) for each in endings]


def _known(ending: Stopped | BaseException) -> Stopped:
    if isinstance(ending, BaseException):
        raise ending
    return ending


class _Stopping:
    """One guest that is being stopped."""

    def __init__(self, host: Runtime, record: GuestRecord, seconds: float) -> None:
        self._folder = RunDirectory(host.run / record.name)
        self._record = record
        self._seconds = seconds
        self._log: logs.Log | None = None
        self._said = ""

    async def run(self, turn: asyncio.Semaphore) -> Stopped:
        with contextlib.ExitStack() as ends:
            with contextlib.suppress(OSError):
                self._log = logs.Log(self._folder.path, logs.CONSOLE)
                ends.callback(self._log.close)
            self._hear()
            self._said = ""
            async with turn:
                if not await self._ask():
                    return Stopped(Ending.DEAF)
                patience = FairTime(self._record.pid, self._seconds + _GRACE)
                ended = await self._ended(patience, while_busy=True)
            ended = ended or await self._ended(patience)
            if not ended and self._left():
                ended = await self._ended(FairTime(self._record.pid, _FINISHING))
            if left := self._left():
                return Stopped(Ending.KILLED, left)
            return Stopped(Ending.SHUT_DOWN if ended else Ending.LATE)

    async def _ask(self) -> bool:
        """Have the guest shut down (images/files/stop); whether it heard, whatever it says else."""
        hundredths = str(round(self._seconds * 100))
        argv = ["setsid", "sh", f"{TOOLS_MOUNTPOINT}/stop", hundredths]
        path = f"{TOOLS_MOUNTPOINT}/bin/busybox"
        call = Agent(self._folder.path).call("guest-exec", Nothing, path=path, arg=argv)
        asking = asyncio.ensure_future(call)
        patience = FairTime(self._record.pid, _ASKING)
        try:
            while not asking.done() and (pause := patience.pause()):
                await asyncio.wait({asking}, timeout=pause)
            return asking.done() and asking.exception() is None
        finally:
            asking.cancel()
            with contextlib.suppress(OnecopyError, asyncio.CancelledError):
                await asking

    async def _ended(self, patience: FairTime, *, while_busy: bool = False) -> bool:
        """Wait until it has ended, as long as there is patience; whether it has."""
        while pause := patience.pause():
            if await wait_for_end(self._record, pause):
                return True
            if while_busy and patience.rests():
                break
        return await wait_for_end(self._record, 0)

    def _left(self) -> str:
        """The programs that had to be killed, as the guest tells; "" if there were none."""
        self._hear()
        if told := _LEFT.search(self._said):
            return f"{told[1]}: {told[2].rstrip()}"
        killed = _KILLED.findall(self._said)
        return f"{len(killed)}: {', '.join(killed[:8])}" if killed else ""

    def _hear(self) -> None:
        """Read what its console has said since the last time, or the newest of that."""
        if self._log:
            for data in self._log.read():
                self._said = (self._said + data.decode(errors="replace"))[-(1 << 16) :]


async def sync_disks(host: Runtime, record: GuestRecord) -> None:
    """Let a guest write what it has for its disks, before it is ended unasked."""
    if record.disks:
        # A guest that has ended has no run directory.
        with contextlib.suppress(OnecopyError, FileNotFoundError):
            await run_captured(host.run / record.name, _SYNC, timeout=PATIENCE)


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
