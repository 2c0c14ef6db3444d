"""Stopping a guest: ask, wait, kill, clean up."""

from __future__ import annotations

import asyncio
import contextlib
import os

from onecopy.build.bootfiles import TOOLS_MOUNTPOINT
from onecopy.errors import AgentFailed
from onecopy.guest.folder import GuestFolder, GuestRecord
from onecopy.guest.host import Host
from onecopy.vmm.agent import Agent

#: Seconds that a guest gets to shut down by itself.
PATIENCE = 10.0
#: Seconds within which a live agent takes the request.
_ASKING = 3.0


async def stop_guest(host: Host, record: GuestRecord, patience: float = PATIENCE) -> bool:
    """Stop one guest; return whether it ended by itself.

    ``patience`` (seconds) is how long it may take to shut down; 0 ends it unasked.
    """
    folder = GuestFolder(host.run / record.name)
    if patience > 0 and await _ask(folder):
        ended = await _ended(record.pid, patience)
    else:
        ended = False
    host.end(record)
    return ended


async def _ask(folder: GuestFolder) -> bool:
    """Have the guest shut down (build/files/stop); whether it heard."""
    argv = ["setsid", "sh", f"{TOOLS_MOUNTPOINT}/stop"]
    path = f"{TOOLS_MOUNTPOINT}/bin/busybox"
    with contextlib.suppress(AgentFailed):
        await Agent(folder.path).call("guest-exec", path=path, arg=argv, timeout=_ASKING)
        return True
    return False


async def _ended(pid: int, patience: float) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        async with asyncio.timeout(patience):
            await gone.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return True
