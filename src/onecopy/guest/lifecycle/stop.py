"""Stops guests: ask, wait, kill, clean up.

Not here: the guest's side of a request (images/files/stop), the measure of its time
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

#: Seconds for a guest to shut down by itself.
PATIENCE = 10.0
#: Seconds for a live agent to accept the request.
_ASKING = 3.0
#: Further seconds: for the guest to end after the time limit of its programs, which it counts; and,
#: if it reports programs that are left, to kill them and write back their files.
_GRACE, _FINISHING = 1.0, 10.0
_SYNC = [f"{TOOLS_MOUNTPOINT}/bin/busybox", "sync"]
#: Lines on the console about killed programs: of files/programs, and of systemd.
_LEFT = re.compile(r"onecopy: did not end in time: ([0-9]{1,6}): ([ -~]{1,200})")
_KILLED = re.compile(r"systemd-shutdown\[1\]: Sending SIGKILL to PID [0-9]{1,7} \(([ -~]{1,64}?)\)")


class Ending(Enum):
    """How a guest was stopped, as a clause for messages."""

    SHUT_DOWN = "shut down"
    """The guest and all of its programs ended by themselves."""
    UNASKED = "was ended"
    DEAF = "was ended: it did not answer"
    LATE = "was ended: it did not shut down in time"
    KILLED = "was ended: not all programs ended in time"
    """The guest killed the programs and then shut down."""


class Stopped(msgspec.Struct, frozen=True):
    """How a guest was stopped."""

    how: Ending
    programs: str = ""
    """The number of programs that did not end in time, and names of some of them."""

    @property
    def text(self) -> str:
        """The clause about the guest for messages."""
        return f"{self.how.value} ({self.programs})" if self.programs else self.how.value


async def stop_guests(
    host: Runtime, records: Sequence[GuestRecord], patience: float = PATIENCE
) -> list[Stopped]:
    """Stop guests; return how each of them ended.

    Guests that keep the host's processors busy are asked in turn. After a cancellation no guest is
    ended, but guests that were asked still shut down.

    Args:
        patience: Seconds for each guest to shut down after the request; 0 ends guests at once. A
            bare machine is always ended at once, because it has no agent to ask.
    """
    turn = turns()

    async def one(record: GuestRecord) -> Stopped:
        if patience <= 0 or not record.agent:
            return Stopped(Ending.UNASKED)
        return await _Stopping(host, record, patience).run(turn)

    with host.ending(*records):
        endings = await asyncio.gather(*map(one, records), return_exceptions=True)
        # All guests end, even if asking one of them failed.
        host.end(*records)
    return [_result_or_raise(each) for each in endings]


def _result_or_raise(ending: Stopped | BaseException) -> Stopped:
    if isinstance(ending, BaseException):
        raise ending
    return ending


class _Stopping:
    """The stop of one guest."""

    def __init__(self, host: Runtime, record: GuestRecord, seconds: float) -> None:
        self._folder = RunDirectory(host.run / record.name)
        self._record = record
        self._seconds = seconds
        self._log: logs.Log | None = None
        self._output = ""

    async def run(self, turn: asyncio.Semaphore) -> Stopped:
        with contextlib.ExitStack() as ends:
            with contextlib.suppress(OSError):
                self._log = logs.Log(self._folder.path, logs.CONSOLE)
                ends.callback(self._log.close)
            self._read_console()
            self._output = ""
            async with turn:
                if not await self._ask():
                    return Stopped(Ending.DEAF)
                patience = FairTime(self._record.pid, self._seconds + _GRACE)
                ended = await self._wait(patience, while_busy=True)
            ended = ended or await self._wait(patience)
            if not ended and self._find_killed():
                ended = await self._wait(FairTime(self._record.pid, _FINISHING))
            if left := self._find_killed():
                return Stopped(Ending.KILLED, left)
            return Stopped(Ending.SHUT_DOWN if ended else Ending.LATE)

    async def _ask(self) -> bool:
        """Ask the guest to shut down (images/files/stop); return whether its agent answered."""
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

    async def _wait(self, patience: FairTime, *, while_busy: bool = False) -> bool:
        """Wait for the end of the guest while there is patience; return whether it has ended."""
        while pause := patience.pause():
            if await wait_for_end(self._record, pause):
                return True
            if while_busy and patience.rests():
                break
        return await wait_for_end(self._record, 0)

    def _find_killed(self) -> str:
        """Return the programs that the guest reports as killed; "" if there are none."""
        self._read_console()
        if told := _LEFT.search(self._output):
            return f"{told[1]}: {told[2].rstrip()}"
        killed = _KILLED.findall(self._output)
        return f"{len(killed)}: {', '.join(killed[:8])}" if killed else ""

    def _read_console(self) -> None:
        """Read new output of the console, and keep the newest 64 KiB."""
        if self._log:
            for data in self._log.read():
                self._output = (self._output + data.decode(errors="replace"))[-(1 << 16) :]


async def sync_disks(host: Runtime, record: GuestRecord) -> None:
    """Sync a guest's disks before the guest is ended without a request."""
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
