"""QMP, QEMU's machine protocol: one short connection for each piece of work.

The protocol itself is the library qemu.qmp. This file translates its errors, bounds each wait, and
implements the commands that onecopy uses.

Source:
    QEMU docs/interop/qmp-spec.rst, qemu-qmp-ref.
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
from onecopy.vmm.sockets import MONITOR

# The library logs errors that it also raises.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
logging.getLogger("qemu.qmp").propagate = False

#: Seconds that QEMU may take to answer, on a busy host.
TIMEOUT = 60.0
#: Seconds of additional time for undoing and cleaning up.
GRACE = 0.5
_ADDRESS = re.compile(r" is (0x[0-9a-f]{1,16})\b")

T = TypeVar("T")


class _Added(msgspec.Struct, frozen=True):
    """The result of add-fd."""

    fd: int
    fdset_id: int = msgspec.field(name="fdset-id")


class _Member(msgspec.Struct, frozen=True):
    """An entry in the result of qom-list."""

    name: str


class _Migration(msgspec.Struct, frozen=True):
    """The data of the event MIGRATION."""

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
        """Execute a command.

        Args:
            timeout: seconds.

        Raises:
            GuestFailed: QEMU refused, did not answer in time, or has ended.
        """
        try:
            async with asyncio.timeout(timeout):
                return await self.client.execute(command, dict(arguments) if arguments else None)
        except TimeoutError:
            raise _no_answer(f"answer {command}", timeout) from None
        except ExecuteError as error:
            raise GuestFailed(f"QEMU refused {command}: {error}") from error
        except (QMPError, OSError) as error:
            raise GuestFailed(f"QEMU ended during {command}") from error

    async def ask(
        self, command: str, form: type[T], arguments: Mapping[str, object] | None = None
    ) -> T:
        """Execute a command and require a result of the type ``form``, as QEMU may be compromised.

        Raises:
            GuestFailed: the command failed or its result is not valid.
        """
        return _read(await self.execute(command, arguments), form, f"QEMU's answer to {command}")

    async def members(self, path: str) -> set[str]:
        """List the names of the members at ``path`` in QEMU's object model."""
        return {each.name for each in await self.ask("qom-list", list[_Member], {"path": path})}

    async def human(self, line: str) -> str:
        """Execute a human-monitor command for which QMP has no equivalent; return its text."""
        return await self.ask("human-monitor-command", str, {"command-line": line})

    async def incoming(self, state_fd: int) -> None:
        """Load a saved state from a descriptor; the guest does not run yet."""
        with self.client.listener("MIGRATION") as progress:
            await self._capabilities("events")
            await self.give_fd(state_fd, "state")
            await self.execute("migrate-incoming", {"uri": "fd:state"})
            try:
                async with asyncio.timeout(TIMEOUT):
                    while await self._next(progress) != "completed":
                        pass
            except TimeoutError:
                raise _no_answer("load the saved state", TIMEOUT) from None

    async def _next(self, progress: EventListener) -> str:
        """Return the next state of a migration; raise GuestFailed if it fails."""
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
        """Write the state of a stopped guest's devices, without its RAM, to an open file.

        QEMU may keep the file open and write to it later. The command is named after Xen, but does
        not need it. It writes a migration stream without RAM, and without the section that
        describes the machine (argv.py tells the reader so).
        """
        writable = os.open(f"/proc/self/fd/{state_fd}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            async with self.lent_copy(writable) as path:
                arguments = {"filename": path, "live": True}
                await self.execute("xen-save-devices-state", arguments)
        finally:
            os.close(writable)

    async def ram_address(self) -> int:
        """Return the address of guest RAM in QEMU's memory."""
        text = await self.human("gpa2hva 0")
        found = _ADDRESS.search(text)
        if not found:
            raise GuestFailed(f"QEMU does not report the address of guest RAM: {text.strip()}")
        return int(found[1], 16)

    async def give_fd(self, fd: int, name: str) -> None:
        """Pass a copy of a descriptor to QEMU (SCM_RIGHTS) under the name ``name``."""
        self._send(fd)
        await self.execute("getfd", {"fdname": name})

    @contextlib.asynccontextmanager
    async def lent(self, fd: int) -> AsyncIterator[str]:
        """Lend QEMU a file during the context; yield the path for opening it (add-fd)."""
        async with self._add_fd(fd) as added:
            yield f"/proc/self/fd/{added.fd}"

    @contextlib.asynccontextmanager
    async def lent_copy(self, fd: int) -> AsyncIterator[str]:
        """Lend QEMU a file that it duplicates instead of opening, as its block devices do.

        The duplicate has the access mode and the locks of this process's descriptor.
        """
        async with self._add_fd(fd) as added:
            yield f"/dev/fdset/{added.fdset_id}"

    @contextlib.asynccontextmanager
    async def _add_fd(self, fd: int) -> AsyncIterator[_Added]:
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
            raise GuestFailed("QEMU has ended") from error

    async def _capabilities(self, *names: str) -> None:
        capabilities = [{"capability": name, "state": True} for name in names]
        await self.execute("migrate-set-capabilities", {"capabilities": capabilities})


def _read(value: Any, form: type[T], what: str) -> T:
    try:
        return convert(value, form, what)
    except AgentFailed as error:
        raise GuestFailed(error.message, hint=error.hint) from None


def _no_answer(what: str, seconds: float) -> GuestFailed:
    return GuestFailed(
        f"QEMU did not {what} within {seconds:.3g} s",
        hint="QEMU is stopped or the host is overloaded; `onecopy stop` can still end the guest",
    )


@contextlib.asynccontextmanager
async def connect(directory: Path, deadline: Deadline | None = None) -> AsyncIterator[Monitor]:
    """Connect to a VMM's monitor, by ``deadline`` or within TIMEOUT seconds.

    Args:
        directory: The VMM's run directory.
        deadline: None for no earlier one.

    Raises:
        GuestFailed: QEMU has ended, does not answer, or is busy with other commands.
    """
    path = directory / MONITOR
    async with contextlib.AsyncExitStack() as stack:
        seconds = (deadline or Deadline()).sooner(TIMEOUT).left() or 0.0
        try:
            async with asyncio.timeout(seconds):
                # One command at a time, because QEMU serves one client and queues only one more.
                await stack.enter_async_context(locked(path.with_suffix(".lock")))
                client, connection = await _negotiate(path)
        except TimeoutError:
            raise _no_answer("answer", seconds) from None
        except (QMPError, OSError) as error:
            raise GuestFailed("QEMU ended before it answered") from error
        try:
            yield Monitor(client)
        finally:
            await _disconnect(client, connection)


async def _disconnect(client: QMPClient, connection: socket.socket) -> None:
    """Disconnect, even from a QEMU that accepts no data, and even during a cancellation."""
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
            # The caller that waited for invalid data has already received the error.
            ending.exception()


async def _negotiate(path: Path) -> tuple[QMPClient, socket.socket]:
    """Connect and negotiate; try again while QEMU closes the previous connection."""
    for delay in (0.01, 0.05, 0.25, 1, None):
        client, connection = QMPClient(), await _open_connection(path)
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


async def _open_connection(path: Path) -> socket.socket:
    """Connect to the socket at ``path``, whose queue may be full for a while."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                connection.connect(str(path))
            except (
                BlockingIOError
            ):  # QEMU does not accept connections, and its queue is full (connect(2))
                await asyncio.sleep(0.05)
            else:
                return connection
    except BaseException:
        # If nothing listens any more, QEMU has ended.
        connection.close()
        raise
