"""QMP, QEMU's machine protocol: one short connection per piece of work.

The protocol itself is the library qemu.qmp; this file turns its errors into ours and knows the
commands that onecopy uses (QEMU docs/interop/qmp-spec.rst, qemu-qmp-ref).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError
from qemu.qmp.events import EventListener

from onecopy.errors import GuestFailed
from onecopy.host.lock import locked

# The library logs what it also raises.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
logging.getLogger("qemu.qmp").propagate = False

_ADDRESS = re.compile(r" is (0x[0-9a-f]+)")


class Monitor:
    """A negotiated QMP connection."""

    def __init__(self, client: QMPClient) -> None:
        self.client = client

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run one command; raise GuestFailed with QEMU's own words, or when QEMU is gone."""
        try:
            return await self.client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as error:
            raise GuestFailed(f"QEMU refused {command}: {error}") from error
        except (QMPError, OSError) as error:
            raise GuestFailed(f"QEMU went away during {command}") from error

    async def human(self, line: str) -> str:
        """Run a human-monitor command where QMP has no equal; return its text."""
        return str(await self.execute("human-monitor-command", {"command-line": line}))

    async def incoming(self, state_fd: int) -> None:
        """Load a saved state from a descriptor of ours; the guest does not run yet."""
        with self.client.listener("MIGRATION") as progress:
            await self._capabilities("events")
            await self.give_fd(state_fd, "state")
            await self.execute("migrate-incoming", {"uri": "fd:state"})
            while await self._next(progress) != "completed":
                pass

    async def _next(self, progress: EventListener) -> str:
        """The next state of a migration; raise GuestFailed if it fails (then QEMU just ends)."""
        event = asyncio.ensure_future(progress.get())
        ended = asyncio.ensure_future(self.client.runstate_changed())
        try:
            await asyncio.wait({event, ended}, return_when=asyncio.FIRST_COMPLETED)
            if event.done():
                data: Any = event.result()["data"]
                if data["status"] != "failed":
                    return str(data["status"])
            raise GuestFailed("QEMU could not load the saved state")
        finally:
            event.cancel()
            ended.cancel()

    async def save_devices(self, state_fd: int) -> None:
        """Write the state of a stopped guest's devices, without its RAM, to a file of ours.

        QEMU may keep the file open, and write to it later. Its command for that is Xen's by name
        only; what it writes is a migration stream without RAM and without the section about the
        machine (argv.py tells the reader).
        """
        writable = os.open(f"/proc/self/fd/{state_fd}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            async with self.lent_copy(writable) as path:
                arguments = {"filename": path, "live": True}
                await self.execute("xen-save-devices-state", arguments)
        finally:
            os.close(writable)

    async def ram_address(self) -> int:
        """Where the first byte of guest RAM lies in QEMU's memory."""
        said = await self.human("gpa2hva 0")
        found = _ADDRESS.search(said)
        if not found:
            raise GuestFailed(f"QEMU does not tell where guest RAM lies: {said.strip()}")
        return int(found[1], 16)

    async def give_fd(self, fd: int, name: str) -> None:
        """Pass a descriptor to QEMU (SCM_RIGHTS), known there as ``name``; ours stays open."""
        self._send(fd)
        await self.execute("getfd", {"fdname": name})

    @contextlib.asynccontextmanager
    async def lent(self, fd: int) -> AsyncIterator[str]:
        """The name under which QEMU can open a file of ours meanwhile (add-fd)."""
        async with self._added(fd) as added:
            yield f"/proc/self/fd/{added['fd']}"

    @contextlib.asynccontextmanager
    async def lent_copy(self, fd: int) -> AsyncIterator[str]:
        """The same for what QEMU does not open, but copies: its block devices.

        The copy is as our file is open, for reading or writing, and has its locks.
        """
        async with self._added(fd) as added:
            yield f"/dev/fdset/{added['fdset-id']}"

    @contextlib.asynccontextmanager
    async def _added(self, fd: int) -> AsyncIterator[dict[str, int]]:
        self._send(fd)
        added = await self.execute("add-fd")
        try:
            yield added
        finally:
            with contextlib.suppress(GuestFailed):
                await self.execute("remove-fd", {"fdset-id": added["fdset-id"]})

    def _send(self, fd: int) -> None:
        try:
            self.client.send_fd_scm(fd)
        except OSError as error:
            raise GuestFailed("QEMU went away") from error

    async def _capabilities(self, *names: str) -> None:
        capabilities = [{"capability": name, "state": True} for name in names]
        await self.execute("migrate-set-capabilities", {"capabilities": capabilities})


@contextlib.asynccontextmanager
async def connect(path: Path) -> AsyncIterator[Monitor]:
    """Connect to a VMM's monitor; raise GuestFailed if it ends before it answers."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            # One command at a time: QEMU serves one client and lets one more wait.
            await stack.enter_async_context(locked(path.with_suffix(".lock")))
            client = await _greeted(path)
        except (QMPError, OSError) as error:
            raise GuestFailed("QEMU ended before it answered") from error
        try:
            yield Monitor(client)
        finally:
            with contextlib.suppress(QMPError, OSError, EOFError):
                await client.disconnect()


async def _greeted(path: Path) -> QMPClient:
    """A new connection. QEMU drops one that comes while it lets go of the last: try again then."""
    for delay in (0.01, 0.05, 0.25, 1, None):
        client = QMPClient()
        try:
            await client.connect(str(path))
        except ConnectError as error:
            # Nobody listens any more: QEMU is gone.
            if delay is None or isinstance(error.exc, ConnectionRefusedError | FileNotFoundError):
                raise
            await asyncio.sleep(delay)
        else:
            break
    return client
