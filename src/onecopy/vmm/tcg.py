"""Kernel parameters for guests under TCG.

Source:
    Linux Documentation/admin-guide/kernel-parameters.txt.
"""

from __future__ import annotations

from onecopy.linux import tsc
from onecopy.vmm.cpu import LEVELS

#: The first QEMU whose cmpxchg16b computes the flags correctly. Older versions compute them from
#: stale state (target/i386/tcg), so an interrupt right after it saves garbage. If that has the trap
#: flag set, the guest panics.
_FIXED = 8
#: X86_FEATURE_CX16 (Linux arch/x86/include/asm/cpufeatures.h), as a number, which all versions of
#: Linux accept. Only the kernel avoids the instruction; programs still see it.
_CX16 = 4 * 32 + 13


def kernel_words(accel: str, version: str, cpu: str) -> str:
    """Return the kernel parameters for QEMU ``version`` with the value ``cpu`` of ``-cpu``.

    Under TCG the time-stamp counter is the host's. A guest calibrates it with a timer. On a busy
    host that timer is late, and the guest's clock would run several times too fast. For the same
    reason the kernel must not test whether its timer interrupts arrive: it panics if they are late.
    Under KVM it skips that test by itself (arch/x86/kernel/kvm.c).

    Two more save a fifth of the kernel's boot: it does not test its cryptography, and does not
    patch instructions for a single vCPU, after which TCG must translate their pages again.
    """
    if accel != "tcg":
        return ""
    words = ["no_timer_check", "cryptomgr.notests", "noreplace-smp"]
    if megahertz := tsc.megahertz():
        words.append(f"tsc_early_khz={megahertz * 1000}")
    major = version.partition(".")[0]
    # A guest that may itself run guests keeps the feature, which its KVM would otherwise hide from
    # them.
    if major.isdecimal() and int(major) < _FIXED and cpu in LEVELS.values():
        words.append(f"clearcpuid={_CX16}")
    return " ".join(words)
