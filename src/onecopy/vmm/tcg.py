"""What a guest's kernel is told where TCG translates it.

The words are those of Linux Documentation/admin-guide/kernel-parameters.txt.
"""

from __future__ import annotations

from onecopy.linux import tsc
from onecopy.vmm.cpu import LEVELS

#: The first QEMU whose cmpxchg16b leaves the flags right. Before, it computes them from stale state
#: (target/i386/tcg), and an interrupt right behind it saves garbage: with a trap flag
#: in it the guest panics.
_FIXED = 8
#: X86_FEATURE_CX16 (Linux arch/x86/include/asm/cpufeatures.h), by number, as all versions of
#: Linux take it. Only the kernel does without: programs see the processor as it is.
_CX16 = 4 * 32 + 13


def kernel_words(accel: str, version: str, cpu: str) -> str:
    """Return the words for a kernel's command line under QEMU ``version``, with its ``-cpu``.

    The time-stamp counter under TCG is the host's. On a busy host a guest measures it by a timer
    that is late, and its clock runs several times too fast from then on.
    """
    if accel != "tcg":
        return ""
    words = []
    if megahertz := tsc.megahertz():
        words.append(f"tsc_early_khz={megahertz * 1000}")
    major = version.partition(".")[0]
    # A guest that may be a host itself keeps it: its KVM would hide it from its own guests.
    if major.isdecimal() and int(major) < _FIXED and cpu in LEVELS.values():
        words.append(f"clearcpuid={_CX16}")
    return " ".join(words)
