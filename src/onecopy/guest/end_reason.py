"""Why a guest that nobody stopped has ended, from what is left of it.

QEMU's word comes first: whether it ended in an orderly way, and who had it end (vmm/end_traces.py).
Only then does the console count, on which a guest can lie about nobody but itself. Pure. Not here:
where ended guests are kept (ended_guests.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum

import msgspec
from msgspec.structs import replace

from onecopy.printable import printable
from onecopy.vmm import end_traces
from onecopy.vmm.end_traces import Noted

#: Characters of a reason.
_MOST = 160
_SIGKILL_CODE = 128 + 9


class Cause(StrEnum):
    """What kind of end it was."""

    POWERED_OFF = "powered-off"
    REBOOTED = "rebooted"
    """Or its machine was reset in another way: QEMU ends then."""
    HALTED = "halted"
    PANIC = "kernel-panic"
    COMMAND = "command-ended"
    """The command that it ran under the minimal init (`--command`)."""
    OUT_OF_MEMORY = "out-of-memory"
    """In the guest, so that its kernel panicked or its command was killed."""
    KILLED = "killed"
    """Its QEMU was."""
    HOST_OUT_OF_MEMORY = "host-out-of-memory"
    """The host's kernel killed its QEMU."""
    FAILED = "qemu-failed"
    UNKNOWN = "unknown"


class Ended(msgspec.Struct, frozen=True):
    """How a guest ended that nobody stopped."""

    at: float | None
    """Seconds since the epoch; None if QEMU could not note it."""
    found: float
    """When a command found out."""
    cause: Cause
    reason: str
    """In words."""
    exit_code: int | None
    """Of its command, if it ended with that."""


class Reason(msgspec.Struct, frozen=True):
    """Why, and in words."""

    cause: Cause
    text: str
    exit_code: int | None = None
    """Of its command, if it is that which ended."""
    noted: bool = False
    """Whether QEMU wrote to its log when it ended."""


#: Each is the last word of a guest, as its kernel, our watcher or minimal init prints it.
_WORDS = re.compile(
    r"Kernel panic - not syncing: (?P<panic>[^\r\n]*)"
    r"|onecopy: the command ended with exit code (?P<code>[0-9]{1,3})\b"
    r"|onecopy: the guest was (?P<ours>halted|powered off|rebooted)"
    r"|reboot: (?P<kernel>System halted|Power down|Restarting system)"
    r"|sysrq: (?P<sysrq>Power Off|Resetting)"
)
_ENDS = {
    "halted": Cause.HALTED,
    "powered off": Cause.POWERED_OFF,
    "rebooted": Cause.REBOOTED,
    "System halted": Cause.HALTED,
    "Power down": Cause.POWERED_OFF,
    "Restarting system": Cause.REBOOTED,
    "Power Off": Cause.POWERED_OFF,
    "Resetting": Cause.REBOOTED,
}
_SAID = {
    Cause.HALTED: "halted",
    Cause.POWERED_OFF: "powered off",
    Cause.REBOOTED: "rebooted",
}
_OOM_KILL = re.compile(r"ut of memory: Killed process [0-9]")
_OOM_PANIC = re.compile(r"deadlocked on memory|[Oo]ut of memory|panic_on_oom")
#: QEMU's own last word; others are warnings, or what it dumps.
_FAILURE = re.compile(
    r"^(?:\S*qemu-system-x86_64: (?!warning:|info:|terminating on )(?P<said>.*)"
    r"|(?P<lib>KVM internal error.*|ERROR:.*|.*: Assertion .*|.*(?:corrupted|double free|"
    r"invalid pointer|stack smashing|out of memory).*))$",
    re.MULTILINE,
)
# QEMU, confined, cannot know what process that is.
_SIGNAL = re.compile(r"terminating on (signal [0-9]+(?: from pid [0-9]+)?)", re.MULTILINE)


def find(
    qemu: str,
    console: str,
    *,
    traced: bool,
    death: Callable[[], str] = str,
    oom: Callable[[], bool] = bool,
) -> Reason:
    """Find why a guest has ended, from its two logs.

    ``traced`` says that its QEMU notes how it ends. Only if it did not, the host's kernel is asked:
    ``death`` is what it says of the process (linux/kmsg.py), ``oom`` whether it has killed one of
    the guest's control group for memory.
    """
    noted = end_traces.read(qemu)
    if noted.in_order:
        return replace(_in_order(noted, console), noted=True)
    said = death() or ("out of memory in its control group" if oom() else "")
    if said:
        return _by_kernel(said)
    failed = _failures(noted)
    if failed:
        return replace(_reason(Cause.FAILED, f"QEMU failed: {failed[-1]}"), noted=True)
    if traced:
        return _reason(Cause.KILLED, "QEMU was killed (SIGKILL), or crashed without a word")
    return _last_word(console) or _reason(Cause.UNKNOWN, "unknown: this QEMU does not note its end")


def _in_order(noted: Noted, console: str) -> Reason:
    if by := _SIGNAL.findall(noted.rest):
        return _reason(Cause.KILLED, f"QEMU was ended by {by[-1]}")
    match noted.cause:
        case end_traces.Cause.HOST_QMP_QUIT:
            return _reason(Cause.KILLED, "QEMU was told to quit at its monitor")
        case end_traces.Cause.HOST_ERROR:
            return _reason(Cause.FAILED, f"QEMU failed: {[*_failures(noted), 'host error'][0]}")
    otherwise = {
        end_traces.Cause.GUEST_SHUTDOWN: Cause.POWERED_OFF,
        end_traces.Cause.GUEST_PANIC: Cause.PANIC,
    }.get(noted.cause or end_traces.Cause.NONE, Cause.REBOOTED)
    return _last_word(console) or _reason(otherwise, _SAID.get(otherwise, "kernel panic"))


def _failures(noted: Noted) -> list[str]:
    return [match["said"] or match["lib"] for match in _FAILURE.finditer(noted.rest)]


def _by_kernel(death: str) -> Reason:
    if death.startswith("out of memory"):
        text = f"the host's kernel killed QEMU: {death}"
        return _reason(Cause.HOST_OUT_OF_MEMORY, text)
    return _reason(Cause.FAILED, f"QEMU crashed: {death}")


def _last_word(console: str) -> Reason | None:
    found = list(_WORDS.finditer(console))
    if not found:
        return None
    panics = [each["panic"] for each in found if each["panic"] is not None]
    # Our watcher says which end it is, and then resets the machine.
    ours = [each for each in found if not (each["kernel"] or each["sysrq"])]
    last = (ours or found)[-1]
    if last["panic"] is not None:
        # The first one is it: the end of the trace says it again.
        if _OOM_PANIC.search(panics[0]):
            return _reason(Cause.OUT_OF_MEMORY, f"out of memory: kernel panic: {panics[0]}")
        return _reason(Cause.PANIC, f"kernel panic: {panics[0]}")
    codes = [each for each in found if each["code"]]
    if codes:
        return _of_command(int(codes[-1]["code"]), console)
    cause = _ENDS[last["ours"] or last["kernel"] or last["sysrq"]]
    return _reason(cause, _SAID[cause])


def _of_command(code: int, console: str) -> Reason:
    if code == _SIGKILL_CODE and _OOM_KILL.search(console):
        text = "out of memory: the guest's kernel killed its command"
        return _reason(Cause.OUT_OF_MEMORY, text, code)
    return _reason(Cause.COMMAND, f"its command ended with exit code {code}", code)


def _reason(cause: Cause, text: str, exit_code: int | None = None) -> Reason:
    shown = printable(text.strip())
    return Reason(cause, shown if len(shown) <= _MOST else f"{shown[:_MOST]}...", exit_code)
