"""QMP, QEMU's machine protocol: one short connection per piece of work.

The protocol itself is the library qemu.qmp; this file turns its errors into ours, gives each wait
an end, and knows the commands that onecopy uses (QEMU docs/interop/qmp-spec.rst, qemu-qmp-ref).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError
from qemu.qmp.events import EventListener

from onecopy.deadline import Deadline
from onecopy.errors import AgentFailed, GuestFailed
from onecopy.linux.lock import locked
from onecopy.vmm.guest_reply import convert

# The library logs what it also raises.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
logging.getLogger("qemu.qmp").propagate = False

#: Seconds that QEMU may take to answer, on a host that has much else to do.
TIMEOUT = 60.0
#: Seconds that what is undone, or tidied up, may take beyond.
GRACE = 0.5
_ADDRESS = re.compile(r" is (0x[0-9a-f]{1,16})\b")

T = TypeVar("T")


class _Added(msgspec.Struct, frozen=True):
    """What add-fd tells."""

    fd: int
    fdset_id: int = msgspec.field(name="fdset-id")


class _Member(msgspec.Struct, frozen=True):
    """One of those that qom-list tells."""

    name: str


class _Migration(msgspec.Struct, frozen=True):
    """What the event MIGRATION has."""

    status: str


class Monitor:
    """A negotiated QMP connection."""

    def __init__(self, client: QMPClient) -> None:
        self.client = client

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float = TIMEOUT,
    ) -> Any:
        """Run one command, for up to ``timeout`` seconds.

        Raises GuestFailed with QEMU's own words, and when QEMU does not answer or is gone.
        """
        try:
            async with asyncio.timeout(timeout):
                return await self.client.execute(command, dict(arguments) if arguments else None)
        except TimeoutError:
            raise _silent(f"answer {command}", timeout) from None
        except ExecuteError as error:
            raise GuestFailed(f"QEMU refused {command}: {error}") from error
        except (QMPError, OSError) as error:
            raise GuestFailed(f"QEMU went away during {command}") from error

    async def ask(
        self, command: str, form: type[T], arguments: Mapping[str, object] | None = None
    ) -> T:
        """Run one command whose result must be of the type ``form``; else raise GuestFailed, too.

        A guest may have taken its QEMU over.
        """
        return _read(await self.execute(command, arguments), form, f"QEMU's answer to {command}")

    async def members(self, path: str) -> set[str]:
        """The names of what QEMU has at ``path`` of its object model."""
        return {each.name for each in await self.ask("qom-list", list[_Member], {"path": path})}

    async def human(self, line: str) -> str:
        """Run a human-monitor command where QMP has no equal; return its text."""
        return await self.ask("human-monitor-command", str, {"command-line": line})

    async def incoming(self, state_fd: int) -> None:
        """Load a saved state from a descriptor of ours; the guest does not run yet."""
        with self.client.listener("MIGRATION") as progress:
            await self._capabilities("events")
            await self.give_fd(state_fd, "state")
            await self.execute("migrate-incoming", {"uri": "fd:state"})
            try:
                async with asyncio.timeout(TIMEOUT):
                    while await self._next(progress) != "completed":
                        pass
            except TimeoutError:
                raise _silent("load the saved state", TIMEOUT) from None

    async def _next(self, progress: EventListener) -> str:
        """The next state of a migration; raise GuestFailed if it fails (then QEMU just ends)."""
        event = asyncio.ensure_future(progress.get())
        ended = asyncio.ensure_future(self.client.runstate_changed())
        try:
            await asyncio.wait({event, ended}, return_when=asyncio.FIRST_COMPLETED)
            if event.done():
                status = _read(event.result().get("data"), _Migration, "QEMU's event").status
                if status != "failed":
                    return status
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
            yield f"/proc/self/fd/{added.fd}"

    @contextlib.asynccontextmanager
    async def lent_copy(self, fd: int) -> AsyncIterator[str]:
        """The same for what QEMU does not open, but copies: its block devices.

        The copy is as our file is open, for reading or writing, and has its locks.
        """
        async with self._added(fd) as added:
            yield f"/dev/fdset/{added.fdset_id}"

    @contextlib.asynccontextmanager
    async def _added(self, fd: int) -> AsyncIterator[_Added]:
        self._send(fd)
        added = await self.ask("add-fd", _Added)
        try:
            yield added
        finally:
            with contextlib.suppress(GuestFailed):
                await self.execute("remove-fd", {"fdset-id": added.fdset_id}, timeout=GRACE)

    def _send(self, fd: int) -> None:
        try:
            self.client.send_fd_scm(fd)
        except OSError as error:
            raise GuestFailed("QEMU went away") from error

    async def _capabilities(self, *names: str) -> None:
        capabilities = [{"capability": name, "state": True} for name in names]
        await self.execute("migrate-set-capabilities", {"capabilities": capabilities})


def _read(value: Any, form: type[T], what: str) -> T:
    try:
        return convert(value, form, what)
    except AgentFailed as error:
        raise GuestFailed(error.message, hint=error.hint) from None


def _silent(what: str, seconds: float) -> GuestFailed:
    return GuestFailed(
        f"QEMU did not {what} within {seconds:.3g} s",
        hint="it is stopped, or the host has too much to do; `onecopy stop` ends it all the same",
    )


@contextlib.asynccontextmanager
async def connect(path: Path, deadline: Deadline | None = None) -> AsyncIterator[Monitor]:
    """Connect to a VMM's monitor, by ``deadline`` or within TIMEOUT seconds.

    Raises GuestFailed if it ends, or does not answer, or other commands speak to it all the time.
    """
    async with contextlib.AsyncExitStack() as stack:
        seconds = (deadline or Deadline()).sooner(TIMEOUT).left() or 0.0
        try:
            async with asyncio.timeout(seconds):
                # One command at a time: QEMU serves one client and lets one more wait.
                await stack.enter_async_context(locked(path.with_suffix(".lock")))
                client, connection = await _greeted(path)
        except TimeoutError:
            raise _silent("answer", seconds) from None
        except (QMPError, OSError) as error:
            raise GuestFailed("QEMU ended before it answered") from error
        try:
            yield Monitor(client)
        finally:
            await _disconnect(client, connection)


async def _disconnect(client: QMPClient, connection: socket.socket) -> None:
    """Let go of QEMU; also of one that takes nothing any more, and when it is time to leave."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    ending = asyncio.ensure_future(client.disconnect())
    try:
        await asyncio.wait({ending}, timeout=GRACE)
    except asyncio.CancelledError:
        await asyncio.wait({ending}, timeout=GRACE)
        raise
    finally:
        if ending.done() and not ending.cancelled():
            # What QEMU sent that could not be read has been told to who waited for it.
            ending.exception()


async def _greeted(path: Path) -> tuple[QMPClient, socket.socket]:
    """A new connection. QEMU drops one that comes while it lets go of the last: try again then."""
    for delay in (0.01, 0.05, 0.25, 1, None):
        client, connection = QMPClient(), await _connected(path)
        try:
            await client.connect(connection)
        except BaseException as error:
            connection.close()
            if delay is None or not isinstance(error, ConnectError):
                raise
            await asyncio.sleep(delay)
        else:
            break
    return client, connection


async def _connected(path: Path) -> socket.socket:
    """A connection to the socket at ``path``, for which there may be no room for a while."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                connection.connect(str(path))
            except BlockingIOError:  # the queue of a QEMU that takes none is full (connect(2))
                await asyncio.sleep(0.05)
            else:
                return connection
    except BaseException:
        # If nobody listens any more, QEMU is gone.
        connection.close()
        raise
