"""The flags of many page frames at once (/proc/kpageflags), as numpy arrays.

The bits are those of ``kpage.Flags``.

Not here: a few frames (``kpage``).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from onecopy.errors import Incompatible
from onecopy.linux.files import ROOT, read_range

_ENTRY = 8
#: Frames that are further apart than this are read separately.
_GAP = 512


def flags(frames: npt.NDArray[np.uint64], root: Path = ROOT) -> npt.NDArray[np.uint64]:
    """Return the kpageflags entry of each page frame.

    Args:
        frames: page frame numbers in any order, shape (pages,).

    Raises:
        NotPermitted: only root may read the flags.
        Incompatible: this kernel does not have them.
    """
    order = np.argsort(frames, kind="stable")
    ascending = frames[order]
    found = np.zeros(len(frames), np.uint64)
    for part in np.split(np.arange(len(frames)), np.flatnonzero(np.diff(ascending) > _GAP) + 1):
        if len(part):
            found[order[part]] = _read(ascending[part], root)
    return found


def _read(ascending: npt.NDArray[np.uint64], root: Path) -> npt.NDArray[np.uint64]:
    path = root / "proc/kpageflags"
    first, last = int(ascending[0]), int(ascending[-1])
    try:
        data = read_range(path, first * _ENTRY, (last - first + 1) * _ENTRY)
    except FileNotFoundError as error:
        raise Incompatible(
            f"this kernel has no {path}",
            hint="onecopy needs a kernel with CONFIG_PROC_PAGE_MONITOR",
        ) from error
    known = np.frombuffer(data[: len(data) // _ENTRY * _ENTRY], np.uint64)
    # The file ends before the frames of device memory, which follow the host's RAM.
    entries = np.zeros(last - first + 1, np.uint64)
    entries[: len(known)] = known
    return entries[(ascending - np.uint64(first)).astype(np.int64)]
