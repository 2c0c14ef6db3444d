"""Freezing a guest's programs for a snapshot: a clone thaws them when it is a machine of its own.

Until then nothing of what was saved runs under another guest's name and clock. The program that
gives clones their identity does it (images/files/freezer.c), and what belongs to it: calendar
timers are stopped, and connections looked for. A guest whose host is gone thaws by itself. Not
here: its processors (guest/pause.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from onecopy.errors import GuestFailed, OnecopyError
from onecopy.guest import identity
from onecopy.vmm.monitor import GRACE
from onecopy.vmm.port_pipe import Pipe

#: Seconds after which a guest thaws by itself (images/files/identity.c), less some.
_DEADLINE = 18.0
#: Seconds that stopping timers and programs may take.
_TIMEOUT = 120.0

_LACKING = {
    "nothing": "the freezing of programs, for which the guest's kernel has no control groups: what "
    "is due runs in clones before they have their names",
    "connections": "the reset of TCP connections, for which the guest's kernel has no INET_DIAG: "
    "those that are open now hang in clones",
}

Still = Callable[[], None]


@contextlib.asynccontextmanager
async def frozen(
    folder: Path, tell: Callable[[str], None], *, last: bool = False
) -> AsyncIterator[Still]:
    """Have the guest's programs frozen meanwhile, and for good if that is the ``last`` it does.

    What this yields raises GuestFailed if the guest may have thawed by itself. ``tell`` is told
    what clones will lack. Raises AgentFailed, GuestFailed.
    """
    with Pipe(folder, "identity") as pipe:
        pipe.drain()
        seconds = _TIMEOUT
        try:
            asked = await _freeze(pipe, tell)

            def still() -> None:
                if time.monotonic() - asked > _DEADLINE:
                    raise GuestFailed(
                        f"it took more than {_DEADLINE:g} s to stop {folder.name}, whose programs "
                        "have gone on",
                        hint="try again when the host has less to do",
                    )

            yield still
        except BaseException as error:
            # The first error is the one to tell.
            seconds = _TIMEOUT if isinstance(error, Exception) else GRACE
            raise
        finally:
            # One that is saved as its last is ended, whatever happens.
            if not last:
                await _thaw(pipe, seconds)


async def _freeze(pipe: Pipe, tell: Callable[[str], None]) -> float:
    """Let programs stand still; since when that lasts, by time.monotonic()."""
    await identity.ask(pipe, "freeze", "frozen", _TIMEOUT)
    # Again, which takes no time: by now the guest counts.
    asked = time.monotonic()
    for lacking in (await identity.ask(pipe, "freeze", "frozen", _TIMEOUT)).split():
        if lacking in _LACKING:
            tell(f"left out: {_LACKING[lacking]}")
    return asked


async def _thaw(pipe: Pipe, seconds: float) -> None:
    """Let programs go on; the guest does so by itself if it does not hear of it."""
    with contextlib.suppress(TimeoutError, OnecopyError):
        async with asyncio.timeout(seconds):
            await identity.ask(pipe, "thaw", "thawed", seconds)
