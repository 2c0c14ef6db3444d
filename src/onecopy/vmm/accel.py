"""KVM or TCG: decided by really running a probe guest, and told why.

A /dev/kvm that opens proves little: under some hypervisors QEMU asserts on it, or the first guest
kernel never gets far. So the probe boots the kernel that guests will have.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from enum import StrEnum
from pathlib import Path

import msgspec

from onecopy.errors import Incompatible
from onecopy.linux import files
from onecopy.vmm.confine import Confinement
from onecopy.vmm.passed_files import READ
from onecopy.vmm.spawn import start
from onecopy.vmm.vmm_user import new_user

#: Seconds after which a probe guest that said nothing new is given up, and after which any is: on a
#: busy host it may be slow.
PROBE_TIMEOUT, PROBE_PATIENCE = 30.0, 150.0
#: What the kernel prints when it reached user space: there is none in the probe.
_SIGN = b"VFS: Unable to mount root fs"
#: What QEMU says, and then stays, when KVM gives a guest up (accel/kvm/kvm-all.c).
_GIVEN_UP = b"KVM internal error"
#: Seconds between two looks at what was said.
_LOOKS = 0.1


class Choice(StrEnum):
    """What the user asked for."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


class Accelerator(msgspec.Struct, frozen=True):
    """What guests run under, and why."""

    name: str
    """``kvm`` or ``tcg``."""
    reason: str


def in_short(reason: str) -> str:
    """Return an accelerator's reason without what a probe guest printed."""
    cause, colon, _ = reason.partition(": ")
    return f"{cause}; `onecopy doctor` says why" if colon else reason


def choose(choice: Choice, binary: str, kernel: Path, cache: Path) -> Accelerator:
    """The accelerator to use; raise Incompatible if ``kvm`` is forced and does not run guests.

    ``cache`` keeps the probe's answer until the host boots again, or its QEMU or the guests' kernel
    changes.
    """
    if choice is Choice.TCG:
        return Accelerator("tcg", "asked for")
    why_not = _kept_probe(binary, kernel, cache)
    if not why_not:
        reason = "asked for" if choice is Choice.KVM else "a probe guest ran under KVM"
        return Accelerator("kvm", reason)
    if choice is Choice.KVM:
        raise Incompatible(f"KVM cannot be used: {why_not}", hint="use --accel tcg, or auto")
    return Accelerator("tcg", f"KVM cannot be used: {why_not}")


def _kept_probe(binary: str, kernel: Path, cache: Path) -> str:
    why_not = _device()
    if why_not:
        return why_not
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    qemu = Path(binary).resolve().stat().st_mtime_ns
    kept = cache / f"kvm-{boot}-{qemu:x}-{kernel.name[:12]}"
    try:
        return kept.read_text()
    except OSError:
        why_not = _probe(binary, kernel)
    files.replace(kept, why_not.encode())
    return why_not


def _device() -> str:
    device = Path("/dev/kvm")
    if not device.exists():
        return "there is no /dev/kvm (no virtualization, or the kvm module is not loaded)"
    if not os.access(device, os.R_OK | os.W_OK):
        return "/dev/kvm may not be opened by this user (add them to the group kvm)"
    return ""


def _probe(binary: str, kernel: Path) -> str:
    """Boot the kernel under KVM until it looks for its root; return "" or why it failed."""
    argv = [binary, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "256M"]
    argv += ["-serial", "stdio", "-append", "console=ttyS0 panic=-1"]
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
    if _SIGN in text:
        return ""
    return f"a probe guest did not run under it ({_why(text)[:200]})"


def _why(text: bytes) -> str:
    """The line of a probe guest's output that tells best why it came no further."""
    lines = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
    if not lines:
        return f"it printed nothing in {PROBE_TIMEOUT:g} s"
    # Registers follow, and the code at which it stood.
    return next((line for line in lines if _GIVEN_UP.decode() in line), lines[-1])


def _wait(process: subprocess.Popen[bytes], output: int) -> None:
    """Wait for the probe guest's end, as long as it gets any further."""
    begin = news = time.monotonic()
    said = b""
    while process.poll() is None and _GIVEN_UP not in said:
        now, before = time.monotonic(), len(said)
        said = os.pread(output, os.fstat(output).st_size, 0)
        news = now if len(said) > before else news
        if now - news > PROBE_TIMEOUT or now - begin > PROBE_PATIENCE:
            return
        time.sleep(_LOOKS)
