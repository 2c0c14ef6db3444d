"""CPU models of guests: a few names of our own, else QEMU's.

A saved system can be started wherever the processor has what its CPU model has. `host` and `max`
are all that one host has; the others are the same everywhere, as the x86-64 psABI's levels are.
"""

from __future__ import annotations

from onecopy.errors import Incompatible

DEFAULT = "x86-64-v2"
#: Besides the level itself AES and random numbers, which Intel has had since 2012, AMD since 2015.
#: No tsc-deadline timer: it ties a running guest to the frequency of its host's TSC.
_V2 = "qemu64,-svm,+ssse3,+sse4.1,+sse4.2,+popcnt,+aes,+pclmulqdq,+rdrand"
#: Besides the level itself xsaveopt: under TCG Linux does not get far with xsave alone.
_V3 = f"{_V2},+avx,+avx2,+bmi1,+bmi2,+f16c,+fma,+movbe,+abm,+xsave,+xsaveopt"
#: Name -> QEMU's -cpu. "enforce": QEMU refuses where the host lacks a feature, and says which
#: (QEMU docs/system/qemu-cpu-models.rst).
LEVELS = {"x86-64-v2": f"{_V2},enforce", "x86-64-v3": f"{_V3},enforce"}


def qemu_cpu(model: str, accel: str) -> str:
    """QEMU's -cpu for ``model``; raise Incompatible for one that ``accel`` cannot be."""
    if model == "host" and accel != "kvm":
        raise Incompatible(
            "the CPU model host needs KVM",
            hint=f"use --cpu max, or a portable one: {', '.join(LEVELS)}",
        )
    return LEVELS.get(model, model)
