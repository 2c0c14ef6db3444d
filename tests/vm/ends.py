"""The ways in which guests end: how to cause each, and the console line that reports it.

Not here: the host's interpretation (guest/end_reason.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from onecopy.errors import OnecopyError
from onecopy.guest.exec import run_captured
from onecopy.guest.lifecycle.stop import wait_for_end
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.vmm import logs

REBOOTED = "onecopy: the guest was rebooted"
POWERED_OFF = "onecopy: the guest was powered off"
HALTED = "onecopy: the guest was halted"
RESET = "sysrq: Resetting"
PANIC = "Kernel panic - not syncing: sysrq triggered crash"
OUT_OF_MEMORY = "Kernel panic - not syncing: Out of memory"

#: Command in the guest -> what is told of its end, whatever its init.
FORCED = {
    "reboot -f": REBOOTED,
    "poweroff -f": POWERED_OFF,
    "halt -f": HALTED,
    "echo o >/proc/sysrq-trigger": POWERED_OFF,
    "echo b >/proc/sysrq-trigger": RESET,
    "echo c >/proc/sysrq-trigger": PANIC,
    "echo 1 >/proc/sys/vm/panic_on_oom; tail /dev/zero": OUT_OF_MEMORY,
}
#: Before an end: ends our watcher and all else, as an init does. It ends what carries a program's
#: output, too. An init writes to the console.
AFTER_ALL = (
    "exec >/dev/console 2>&1; trap '' TERM; kill -TERM -1; sleep 1; kill -KILL -1; sleep 1; "
)
#: Not with the minimal init, which ends the machine with its command, and may be first.
ALONE = {AFTER_ALL + "reboot -f": REBOOTED}
ASKED = {"reboot": REBOOTED, "poweroff": POWERED_OFF, "halt": HALTED}
MINIMAL = {"kill -9 $(cat /run/onecopy/command.pid)": "the command ended with exit code 137"}
SYSTEMD = {
    "systemctl reboot": REBOOTED,
    "systemctl poweroff": POWERED_OFF,
    "systemctl halt": HALTED,
    "systemctl reboot -f": REBOOTED,
    "systemctl reboot -ff": REBOOTED,
    "systemctl poweroff -ff": POWERED_OFF,
    "systemctl halt -ff": HALTED,
    "shutdown -h now": POWERED_OFF,
    "shutdown -r now": REBOOTED,
}
#: All of them, for each init.
ENDS = {
    "minimal": FORCED | ASKED | MINIMAL,
    "busybox": FORCED | ALONE | ASKED,
    "systemd": FORCED | ALONE | ASKED | SYSTEMD,
}
#: Seconds after which a guest that does not end hangs, on a host with much else to do.
STUCK = 240.0


class Told(msgspec.Struct, frozen=True):
    """What came of a command that was to end a guest."""

    command: str
    ended: bool
    console: str
    """What the console said since."""


def end_all(host: Runtime, guests: Sequence[GuestRecord], commands: Sequence[str]) -> list[Told]:
    """Run each command in a guest of its own, all at once; each guest is gone then."""

    async def all_of_them() -> list[Told]:
        return await asyncio.gather(*map(end, guests, commands))

    async def end(guest: GuestRecord, command: str) -> Told:
        return await _end(host.run / guest.name, guest, command)

    return asyncio.run(all_of_them())


async def _end(folder: Path, guest: GuestRecord, command: str) -> Told:
    log = logs.Log(folder, logs.CONSOLE)
    list(log.read())
    running = asyncio.ensure_future(run_captured(folder, ["sh", "-c", command], timeout=STUCK))
    ended = await wait_for_end(guest, STUCK)
    running.cancel()
    with contextlib.suppress(OnecopyError, asyncio.CancelledError):
        await running
    console = b"".join(log.read()).decode(errors="replace")
    log.close()
    return Told(command, ended, console)


def wrong(told: Sequence[Told], expected: dict[str, str]) -> list[str]:
    """The ends that did not come, or were not told."""
    return [
        f"{each.command!r}: {'ended' if each.ended else 'runs on'}: {each.console[-500:]}"
        for each in told
        if not each.ended or not re.search(re.escape(expected[each.command]), each.console)
    ]


def seconds(began: float) -> str:
    """How long it has taken, for who looks on."""
    return f"{time.monotonic() - began:.1f} s"
