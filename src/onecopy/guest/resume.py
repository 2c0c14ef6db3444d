"""Letting guests go on that stand still for a command that was killed (pause.py).

Done by the next command of any kind, so it must cost that nothing: all at once, for a moment, and a
QEMU that does not answer is not asked again by each command.
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

#: Seconds that a QEMU gets, and after which one that did not answer is asked again.
_MOMENT, _AGAIN = 1.0, 30.0


def go_on(folders: Sequence[Path]) -> None:
    """Let the guests of these run folders go on; also from within an event loop."""
    # The thread is a daemon, so that a moment is all that it takes, whatever a QEMU does.
    thread = threading.Thread(target=_all_go_on, args=(folders,), daemon=True)
    thread.start()
    thread.join(2 * _MOMENT)


def _all_go_on(folders: Sequence[Path]) -> None:
    async def work() -> None:
        await asyncio.gather(*map(_go_on, folders), return_exceptions=True)

    asyncio.run(work())


async def _go_on(folder: Path) -> None:
    mark = folder / "paused"
    # Not while another command does, or lets it stand still again.
    with take_over(mark) as fd:
        if fd is None or _was_asked(fd):
            return
        os.pwrite(fd, b"!", 0)
        with contextlib.suppress(GuestFailed):
            async with asyncio.timeout(_MOMENT), connect(folder / "monitor.sock") as monitor:
                await monitor.execute("cont")
                mark.unlink(missing_ok=True)


def _was_asked(fd: int) -> bool:
    """Whether a command has just asked in vain, as the mark notes."""
    found = os.fstat(fd)
    return found.st_size > 0 and time.time() - found.st_mtime < _AGAIN
