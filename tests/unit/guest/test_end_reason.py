"""Why a guest ended, from logs as real ends leave them.

Those of QEMU 7.2 were recorded; QEMU 10 calls one event by another name (migration/trace-events).
Not here: that QEMU writes them (tests/vm/test_ended.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from onecopy.guest.end import Cause
from onecopy.guest.end_reason import Reason, find
from onecopy.vmm import end_traces

ENDS = Path(__file__).parents[1] / "data/ends"
PANIC = (ENDS / "panic.txt").read_text()
#: How each QEMU's log ends that ended in an orderly way.
RESET = {"7.2": "migrate_fd_cancel \n", "10": "migration_cancel \n"}
NAME = "qemu-system-x86_64"
SIGTERM = f"{NAME}: terminating on signal 15 from pid 5036 (<unknown process>)\n"


def shut_down(reason: int) -> str:
    return f"qemu_system_shutdown_request reason={reason}\n{RESET['7.2']}"


def reason(qemu: str, console: str = "", death: str = "", *, oom: bool = False) -> Reason:
    return find(qemu, console, traced=True, death=lambda: death, oom=lambda: oom)


@pytest.mark.parametrize("version", RESET)
@pytest.mark.parametrize(
    ("console", "cause", "text"),
    [
        ("", Cause.REBOOTED, "rebooted"),
        (PANIC, Cause.PANIC, "kernel panic: sysrq triggered crash"),
        ("[ 1.5] onecopy: the guest was halted\r\n", Cause.HALTED, "halted"),
        ("[ 1.5] onecopy: the guest was powered off\r\n", Cause.POWERED_OFF, "powered off"),
        ("[ 1.5] onecopy: the guest was rebooted\r\n", Cause.REBOOTED, "rebooted"),
        (
            "[1] sysrq: Power Off\n[2] onecopy: the guest was powered off\n[3] sysrq: Resetting\n",
            Cause.POWERED_OFF,
            "powered off",
        ),
        ("[ 9.1] reboot: Power down\r\n", Cause.POWERED_OFF, "powered off"),
        (
            "onecopy: the command ended with exit code 5\r\n",
            Cause.COMMAND,
            "its command ended with exit code 5",
        ),
        # Our own init ends the machine after that, whatever is said of it.
        (
            "onecopy: the command ended with exit code 0\n[ 3.0] onecopy: the guest was rebooted\n",
            Cause.COMMAND,
            "its command ended with exit code 0",
        ),
        (
            "Out of memory: Killed process 77 (python3) total-vm:1kB\n"
            "onecopy: the command ended with exit code 137\n",
            Cause.OUT_OF_MEMORY,
            "out of memory: the guest's kernel killed its command",
        ),
        # Killed by somebody, after another had been out of memory or not.
        (
            "onecopy: the command ended with exit code 137\n",
            Cause.COMMAND,
            "its command ended with exit code 137",
        ),
        (
            "[ 2.0] Kernel panic - not syncing: System is deadlocked on memory\n"
            "[ 2.1] ---[ end Kernel panic - not syncing: System is deadlocked on memory ]---\n",
            Cause.OUT_OF_MEMORY,
            "out of memory: kernel panic: System is deadlocked on memory",
        ),
        # It spoke of one before.
        (f"{PANIC}\nonecopy: the guest was halted\n", Cause.HALTED, "halted"),
    ],
)
def test_what_a_guest_says(version: str, console: str, cause: Cause, text: str) -> None:
    found = reason(RESET[version], console)
    assert (found.cause, found.text) == (cause, text)
    assert found.noted


@pytest.mark.parametrize(
    ("qemu", "cause", "text"),
    [
        (shut_down(6), Cause.POWERED_OFF, "powered off"),
        (shut_down(7), Cause.REBOOTED, "rebooted"),
        (shut_down(8), Cause.PANIC, "kernel panic"),
        (shut_down(2), Cause.KILLED, "QEMU got a quit command on its monitor"),
        (f"{SIGTERM}{RESET['7.2']}", Cause.KILLED, "QEMU was ended by signal 15 from pid 5036"),
        # A later version's, unknown here.
        (shut_down(99), Cause.REBOOTED, "rebooted"),
    ],
)
def test_what_qemu_notes(qemu: str, cause: Cause, text: str) -> None:
    found = reason(qemu)
    assert (found.cause, found.text, found.noted) == (cause, text, True)


@pytest.mark.parametrize(
    ("qemu", "death", "oom", "cause", "text"),
    [
        ("", "", False, Cause.KILLED, "QEMU was killed"),
        (f"{NAME}: warning: TCG doesn't support it\n", "", False, Cause.KILLED, "QEMU was killed"),
        ("", "out of memory", False, Cause.HOST_OUT_OF_MEMORY, "the host's kernel killed QEMU: "),
        ("", "", True, Cause.HOST_OUT_OF_MEMORY, "out of memory in its control group"),
        ("", "segfault at 0", False, Cause.FAILED, "QEMU crashed: segfault at 0"),
        (
            f"{NAME}: warning: old\n{NAME}: ../hw/x.c:7: f: Assertion `a == b' failed.\n",
            *("", False, Cause.FAILED, "QEMU failed: ../hw/x.c:7: f: Assertion `a == b' failed."),
        ),
    ],
)
def test_a_qemu_that_notes_nothing(
    qemu: str, death: str, oom: bool, cause: Cause, text: str
) -> None:
    # Whatever its guest says: that it panicked did not end it.
    found = reason(qemu, PANIC, death, oom=oom)
    assert found.cause == cause
    assert text in found.text


def test_a_qemu_that_cannot_note_it() -> None:
    assert find("", "", traced=False).cause == Cause.UNKNOWN
    assert find("", PANIC, traced=False).cause == Cause.PANIC


def test_the_kernel_is_not_asked_in_vain() -> None:
    def asked() -> str:
        raise AssertionError

    assert find(RESET["7.2"], "", traced=True, death=asked).cause == Cause.REBOOTED


def test_a_guest_says_no_more_than_a_line() -> None:
    found = reason(RESET["7.2"], "Kernel panic - not syncing: \x1b[31m" + "x" * 10_000 + "\nmore")
    assert found.text.startswith("kernel panic: \\x1b[31mxxx")
    assert len(found.text) < 200


def test_notes_are_no_output() -> None:
    log = f"{NAME}: one\n{shut_down(6)}two\n"
    assert end_traces.read(log).rest == f"{NAME}: one\ntwo\n"


def test_which_events_a_qemu_has() -> None:
    printed = f"{NAME}: -trace migration_cancel: warning: does not exist\n{shut_down(2)}"
    assert end_traces.of_binary(printed) == ("qemu_system_shutdown_request", "migrate_fd_cancel")
    # Built so that it notes them elsewhere, or not at all.
    assert end_traces.of_binary("") == end_traces.of_binary("migrate_fd_cancel \n") == ()
