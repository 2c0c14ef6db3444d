"""Finds the reason why a guest ended that nobody stopped, from its two logs. Pure functions.

QEMU's log has priority: whether QEMU exited in order, and what made it exit (vmm/end_traces.py).
The console comes second. A guest can forge its console, but then lies only about itself. Not here:
the records of ended guests (ended_guests.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec
from msgspec.structs import replace

from onecopy.guest.end import Cause
from onecopy.printable import printable
from onecopy.vmm import end_traces
from onecopy.vmm.end_traces import LoggedEnd

#: The longest reason in characters.
_MAX_TEXT = 160
_SIGKILL_CODE = 128 + 9


class Reason(msgspec.Struct, frozen=True):
    """The reason of an end."""

    cause: Cause
    text: str
    exit_code: int | None = None
    """Exit code of the guest's command, if that ended the guest."""
    noted: bool = False
    """Whether QEMU logged its end."""


#: The last lines of a guest, as its kernel, the watcher or the minimal init prints them.
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
#: QEMU's last error; other lines are warnings or dumps.
_FAILURE = re.compile(
    r"^(?:\S*qemu-system-x86_64: (?!warning:|info:|terminating on )(?P<said>.*)"
    r"|(?P<lib>KVM internal error.*|ERROR:.*|.*: Assertion .*|.*(?:corrupted|double free|"
    r"invalid pointer|stack smashing|out of memory).*))$",
    re.MULTILINE,
)
# QEMU is confined and cannot name the process.
_SIGNAL = re.compile(r"terminating on (signal [0-9]+(?: from pid [0-9]+)?)", re.MULTILINE)


def find(
    qemu: str,
    console: str,
    *,
    traced: bool,
    death: Callable[[], str] = str,
    oom: Callable[[], bool] = bool,
) -> Reason:
    """Find the reason of an end.

    Args:
        qemu: The end of QEMU's log.
        console: The end of the console's log.
        traced: Whether this QEMU logs how it ends.
        death: Asks the host's kernel for the reason of the process's death (linux/kmsg.py); called
            only if QEMU did not exit in order.
        oom: Asks whether the kernel killed a process of the guest's control group for memory.
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
        return _reason(Cause.KILLED, "QEMU was killed (SIGKILL), or crashed without a message")
    return _last_word(console) or _reason(Cause.UNKNOWN, "unknown: this QEMU does not log its end")


def _in_order(noted: LoggedEnd, console: str) -> Reason:
    if by := _SIGNAL.findall(noted.rest):
        return _reason(Cause.KILLED, f"QEMU was ended by {by[-1]}")
    match noted.cause:
        case end_traces.Cause.HOST_QMP_QUIT:
            return _reason(Cause.KILLED, "QEMU got a quit command on its monitor")
        case end_traces.Cause.HOST_ERROR:
            return _reason(Cause.FAILED, f"QEMU failed: {[*_failures(noted), 'host error'][0]}")
    otherwise = {
        end_traces.Cause.GUEST_SHUTDOWN: Cause.POWERED_OFF,
        end_traces.Cause.GUEST_PANIC: Cause.PANIC,
    }.get(noted.cause or end_traces.Cause.NONE, Cause.REBOOTED)
    return _last_word(console) or _reason(otherwise, _SAID.get(otherwise, "kernel panic"))


def _failures(noted: LoggedEnd) -> list[str]:
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
    # The watcher prints the kind of end, then resets the machine. Its line overrides the kernel's.
    ours = [each for each in found if not (each["kernel"] or each["sysrq"])]
    last = (ours or found)[-1]
    if last["panic"] is not None:
        # The first line has the reason. The kernel repeats it after the trace.
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
    cut = shown if len(shown) <= _MAX_TEXT else f"{shown[:_MAX_TEXT]}..."
    return Reason(cause, cut, exit_code)
