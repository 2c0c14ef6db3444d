"""CPU models of guests: a few names of onecopy's own, otherwise QEMU's.

A saved system starts wherever the CPU has the features of its model. `host` and `max` have all
features of one host. The others are the same everywhere, like the levels of the x86-64 psABI.
"""

from __future__ import annotations

from onecopy.errors import Incompatible

DEFAULT = "x86-64-v2"
#: The level, plus AES and random numbers, which Intel has had since 2012 and AMD since 2015. No
#: tsc-deadline timer: it would tie a running guest to its host's TSC frequency.
_V2 = "qemu64,-svm,+ssse3,+sse4.1,+sse4.2,+popcnt,+aes,+pclmulqdq,+rdrand"
#: The level, plus xsaveopt: under TCG, Linux does not get far with xsave alone.
_V3 = f"{_V2},+avx,+avx2,+bmi1,+bmi2,+f16c,+fma,+movbe,+abm,+xsave,+xsaveopt"
#: Name -> value of QEMU's -cpu. With "enforce", QEMU refuses a host that lacks a feature, and names
#: it (QEMU docs/system/qemu-cpu-models.rst).
LEVELS = {"x86-64-v2": f"{_V2},enforce", "x86-64-v3": f"{_V3},enforce"}


def qemu_cpu(model: str, accel: str) -> str:
    """Return the value of QEMU's -cpu for a model.

    Raises:
        Incompatible: the accelerator does not support the model.
    """
    if model == "host" and accel != "kvm":
        raise Incompatible(
            "the CPU model host needs KVM",
            hint=f"use --cpu max or a portable model: {', '.join(LEVELS)}",
        )
    return LEVELS.get(model, model)
