"""Keep the results of probes of QEMU until the host reboots or what was probed changes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from onecopy.linux import files


def remember(
    cache: Path, name: str, binary: str, probe: Callable[[], str], *, again: float = math.inf
) -> str:
    """Return why a probe failed, "" if it did not.

    Args:
        cache: the directory for the results.
        name: what is probed, apart from ``binary``.
        binary: QEMU.
        probe: the probe.
        again: the seconds after which a probe that failed is repeated.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    qemu = Path(binary).resolve().stat().st_mtime_ns
    path = cache / f"{name}-{boot}-{qemu:x}"
    try:
        why_not = path.read_text()
        if not why_not or time.time() - path.stat().st_mtime < again:
            return why_not
    except OSError:
        pass
    why_not = probe()
    files.replace(path, why_not.encode())
    return why_not
