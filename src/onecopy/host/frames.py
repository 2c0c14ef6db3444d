"""What the kernel knows of many page frames at once (/proc/kpageflags, /proc/kpagecount).

As numpy arrays; the bits are those of ``kpage.Flags``. Not here: a few frames (``kpage``).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from onecopy.errors import Incompatible
from onecopy.host.files import ROOT, read_range

Entries = npt.NDArray[np.uint64]

_ENTRY = 8
#: Frames that lie further apart than this are read one after the other.
_GAP = 512


def flags(frames: Entries, root: Path = ROOT) -> Entries:
    """The flags of each of ``frames``. Raises NotPermitted, Incompatible."""
    return _entries(frames, root / "proc/kpageflags")


def counts(frames: Entries, root: Path = ROOT) -> Entries:
    """How many times each of ``frames`` is mapped. Raises NotPermitted, Incompatible."""
    return _entries(frames, root / "proc/kpagecount")


def _entries(frames: Entries, path: Path) -> Entries:
    order = np.argsort(frames, kind="stable")
    ascending = frames[order]
    found = np.zeros(len(frames), np.uint64)
    for part in np.split(np.arange(len(frames)), np.flatnonzero(np.diff(ascending) > _GAP) + 1):
        if len(part):
            found[order[part]] = _read(ascending[part], path)
    return found


def _read(ascending: Entries, path: Path) -> Entries:
    first, last = int(ascending[0]), int(ascending[-1])
    try:
        data = read_range(path, first * _ENTRY, (last - first + 1) * _ENTRY)
    except FileNotFoundError as error:
        raise Incompatible(
            f"this kernel has no {path}", hint="it was built without CONFIG_PROC_PAGE_MONITOR"
        ) from error
    entries = np.frombuffer(data, np.uint64)
    return entries[(ascending - np.uint64(first)).astype(np.int64)]
