"""Choose KVM or TCG by actually running a probe guest, and record the reason.

That /dev/kvm opens proves little. Under some hypervisors QEMU then fails an assertion, or the first
guest kernel does not get far. So the probe boots the kernel that guests use.
"""

from __future__ import annotations

import os
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from onecopy.errors import Incompatible
from onecopy.vmm.probe_cache import remember

if TYPE_CHECKING:
    from onecopy.vmm.spawn import Process

#: Seconds after which a probe guest without new output is ended, and the limit for any: a busy host
#: is slow.
PROBE_TIMEOUT, PROBE_PATIENCE = 30.0, 150.0
#: The kernel's message when it has reached the end of its boot, since the probe has no root.
_SUCCESS = b"VFS: Unable to mount root fs"
#: QEMU's message when KVM gives a guest up; QEMU does not end then (accel/kvm/kvm-all.c).
_GIVEN_UP = b"KVM internal error"
#: Seconds between two looks at the output.
_POLL_INTERVAL = 0.1


class Choice(StrEnum):
    """The user's choice."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


class Accelerator(msgspec.Struct, frozen=True):
    """The accelerator for guests, and the reason for it."""

    name: str
    """``kvm`` or ``tcg``."""
    reason: str


def in_short(reason: str) -> str:
    """Return an accelerator's reason without what a probe guest printed."""
    cause, colon, _ = reason.partition(": ")
    return f"{cause}; `onecopy doctor` says why" if colon else reason


def choose(choice: Choice, binary: str, kernel: Path, cache: Path) -> Accelerator:
    """Choose the accelerator.

    Args:
        choice: the user's choice.
        binary: QEMU.
        kernel: the kernel for the probe guest.
        cache: keeps the probe's result until the host reboots, or QEMU or the kernel changes.

    Raises:
        Incompatible: ``kvm`` is required but does not run guests.
    """
    if choice is Choice.TCG:
        return Accelerator("tcg", "requested")
    why_not = _cached_probe(binary, kernel, cache)
    if not why_not:
        reason = "requested" if choice is Choice.KVM else "a probe guest ran under KVM"
        return Accelerator("kvm", reason)
    if choice is Choice.KVM:
        raise Incompatible(f"KVM cannot be used: {why_not}", hint="use --accel tcg or --accel auto")
    return Accelerator("tcg", f"KVM cannot be used: {why_not}")


def _cached_probe(binary: str, kernel: Path, cache: Path) -> str:
    why_not = _device()
    if why_not:
        return why_not
    return remember(cache, f"kvm-{kernel.name[:12]}", binary, lambda: _probe(binary, kernel))


def _device() -> str:
    device = Path("/dev/kvm")
    if not device.exists():
        return "/dev/kvm does not exist (no virtualization, or the kvm module is not loaded)"
    if not os.access(device, os.R_OK | os.W_OK):
        return "this user may not open /dev/kvm (root can add the user to the group kvm)"
    return ""


def _probe(binary: str, kernel: Path) -> str:
    """Boot the kernel under KVM until it looks for its root; return "" or why it failed."""
    # A probe runs once, and its result is kept.
    import tempfile

    from onecopy.vmm.confine import Confinement
    from onecopy.vmm.passed_files import READ
    from onecopy.vmm.spawn import start
    from onecopy.vmm.vmm_user import new_user

    argv = [binary, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "256M"]
    # On a nested host each character takes long. Notices still tell of progress.
    words = "console=ttyS0 loglevel=6 cryptomgr.notests panic=-1"
    argv += ["-serial", "stdio", "-append", words]
    with tempfile.TemporaryFile() as output, kernel.open("rb") as image:
        fd = image.fileno()
        argv += ["-kernel", f"/proc/self/fd/{fd}"]
        confinement = Confinement(new_user("kvm"), 0, {fd: READ}, kvm=True, asks=False)
        process = start(argv, confinement, Path("/"), output.fileno(), [fd]).process
        try:
            _wait(process, output.fileno())
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        text = output.read()
    if _SUCCESS in text:
        return ""
    return f"a probe guest did not run under it ({_failure_line(text)[:200]})"


def _failure_line(text: bytes) -> str:
    """Return the line of a probe guest's output that best explains the failure."""
    lines = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
    if not lines:
        return f"it printed nothing in {PROBE_TIMEOUT:g} s"
    # QEMU prints registers and code after this line.
    return next((line for line in lines if _GIVEN_UP.decode() in line), lines[-1])


def _wait(process: Process, output: int) -> None:
    """Wait for the end of the probe guest, as long as it makes progress."""
    begin = last_output = time.monotonic()
    seen = b""
    while process.poll() is None and _GIVEN_UP not in seen:
        now, before = time.monotonic(), len(seen)
        seen = os.pread(output, os.fstat(output).st_size, 0)
        last_output = now if len(seen) > before else last_output
        if now - last_output > PROBE_TIMEOUT or now - begin > PROBE_PATIENCE:
            return
        time.sleep(_POLL_INTERVAL)
