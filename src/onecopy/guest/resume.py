"""Resumes guests that a killed command left paused (pause.py).

Every command does this at its start, so it must be quick. All guests are resumed at once with a
short time limit. A QEMU that did not answer is not asked again for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from onecopy.errors import GuestFailed
from onecopy.linux.lock import take_over
from onecopy.vmm.monitor import connect

#: Seconds for a QEMU to answer, and until one that did not answer is asked again.
_MOMENT, _AGAIN = 1.0, 30.0


def go_on(folders: Sequence[Path]) -> None:
    """Resume the guests of these run directories; works inside an event loop, too."""
    # A daemon thread: a QEMU that hangs delays this command only for a moment.
    thread = threading.Thread(target=_all_go_on, args=(folders,), daemon=True)
    thread.start()
    thread.join(2 * _MOMENT)


def _all_go_on(folders: Sequence[Path]) -> None:
    async def work() -> None:
        await asyncio.gather(*map(_go_on, folders), return_exceptions=True)

    asyncio.run(work())


async def _go_on(folder: Path) -> None:
    mark = folder / "paused"
    # Skip a mark that another command holds: it resumes the guest, or has paused it anew.
    with take_over(mark) as fd:
        if fd is None or _was_asked(fd):
            return
        os.pwrite(fd, b"!", 0)
        with contextlib.suppress(GuestFailed):
            async with asyncio.timeout(_MOMENT), connect(folder) as monitor:
                await monitor.execute("cont")
                mark.unlink(missing_ok=True)


def _was_asked(fd: int) -> bool:
    """Return whether a command has tried in the last seconds, as the mark records."""
    found = os.fstat(fd)
    return found.st_size > 0 and time.time() - found.st_mtime < _AGAIN
