"""Plugs in virtio ports for the streams of a program in a guest, and unplugs them after it.

A machine has a fixed number of ports. If none is free, a program waits until another one ends. Not
here: the data on the ports (exec.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from onecopy.deadline import Deadline
from onecopy.errors import GuestFailed, NoSlot
from onecopy.linux.lock import is_held, locked
from onecopy.vmm.monitor import Monitor, connect
from onecopy.vmm.pmem_hotplug import EXEC_PORT

#: Time limits for unplugging ports in seconds: as a rule, and after an error or a cancellation.
_PATIENCE, HURRY = 10.0, 1.5
#: Seconds between attempts to get a port: at first, and at most.
_SOON, _LATER = 0.05, 1.0
#: QEMU's error messages when no port is free (hw/char/virtio-serial-bus.c).
_FULL = ("Maximum port limit", "Out-of-range port id")
_LABEL = re.compile(r"(exec\.[0-9a-f]{16})\.(?:in|out|err)", re.ASCII)

Ports = dict[str, socket.socket]
Ending = Callable[[], Awaitable[None]]


class _Chardev(msgspec.Struct, frozen=True):
    label: str


@contextlib.asynccontextmanager
async def plugged(
    folder: Path, tag: str, stdin: bool, deadline: Deadline, ending: Ending
) -> AsyncIterator[Ports]:
    """Plug in a port for each stream, and unplug them at the end.

    In the block the file ``exec.TAG`` is locked. The lock distinguishes its ports from those that a
    killed command left.

    Args:
        folder: The guest's run directory.
        tag: A random tag, unique to the program.
        stdin: Whether the program needs a port for its input.
        deadline: When to stop waiting for a free port.
        ending: Called while the ports are unplugged.

    Raises:
        NoSlot: No port became free before the deadline.
        GuestFailed: QEMU failed or ended.
    """
    names = [f"{tag}.{name}" for name in (["in"] if stdin else []) + ["out", "err"]]
    mark, sockets, patience = folder / f"exec.{tag}", Ports(), _PATIENCE
    async with locked(mark):
        try:
            await _plug_all(folder, names, sockets, deadline)
            yield {name.rpartition(".")[2]: port for name, port in sockets.items()}
        except BaseException:
            patience = HURRY
            raise
        finally:
            try:
                await asyncio.gather(_unplug_all(folder, list(sockets), patience), ending())
            finally:
                mark.unlink(missing_ok=True)
                for port in sockets.values():
                    port.close()


async def _plug_all(folder: Path, names: Sequence[str], sockets: Ports, deadline: Deadline) -> None:
    """Plug in all ports of ``names``, and wait until they fit; add them to ``sockets``."""
    delay, found_none = _SOON, False
    try:
        while not await _try_plug(folder, names, sockets):
            found_none = True
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LATER)
    except asyncio.CancelledError:
        if not found_none or deadline.left() != 0:
            raise
        # The deadline ended the wait for a port.
        raise NoSlot(
            f"{folder.name} has no free port for the program's streams: other `onecopy exec` "
            "programs use all, and none ended in time",
            hint="wait for them to end, or give a longer --timeout",
        ) from None


async def _try_plug(folder: Path, names: Sequence[str], sockets: Ports) -> bool:
    """Plug in all ports or none; return whether they fit."""
    async with connect(folder) as monitor:
        await _remove_abandoned(monitor, folder)
        try:
            for name in names:
                await _plug(monitor, name, sockets)
        except GuestFailed as error:
            if not any(words in error.message for words in _FULL):
                raise
            await _unplug(monitor, list(sockets))
            while sockets:
                sockets.popitem()[1].close()
    return bool(sockets)


async def _plug(monitor: Monitor, name: str, sockets: Ports) -> None:
    sockets[name], peer = socket.socketpair()
    sockets[name].setblocking(False)
    identity = f"exec.{name}"
    with peer:
        await monitor.give_fd(peer.fileno(), identity)
    address = {"type": "fd", "data": {"str": identity}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    await monitor.execute("chardev-add", {"id": identity, "backend": backend})
    device = {"driver": "virtserialport", "bus": "serial.0", "id": EXEC_PORT + name}
    await monitor.execute("device_add", {**device, "chardev": identity, "name": name})


async def _unplug_all(folder: Path, names: Sequence[str], seconds: float) -> None:
    """Unplug ports; ignore a QEMU that is gone or does not answer. The next command retries."""
    if names:
        with contextlib.suppress(GuestFailed, TimeoutError):
            async with asyncio.timeout(seconds), connect(folder) as monitor:
                await _unplug(monitor, names)


async def _unplug(monitor: Monitor, names: Sequence[str]) -> None:
    for name in names:
        with contextlib.suppress(GuestFailed):
            await monitor.execute("device_del", {"id": EXEC_PORT + name})
    for name in names:
        await _remove_chardev(monitor, f"exec.{name}")


async def _remove_chardev(monitor: Monitor, label: str) -> None:
    """Remove a character device, which QEMU releases milliseconds after its port (util/rcu.c)."""
    for _ in range(50):
        try:
            await monitor.execute("chardev-remove", {"id": label})
        except GuestFailed as error:
            if "busy" not in error.message:
                return
            await asyncio.sleep(0.005)
        else:
            return


async def _remove_abandoned(monitor: Monitor, folder: Path) -> None:
    """Unplug the ports of killed commands."""
    chardevs = await monitor.ask("query-chardev", list[_Chardev])
    # A label becomes a file name, so only labels of onecopy's own form are accepted.
    found = {each.label: found[1] for each in chardevs if (found := _LABEL.fullmatch(each.label))}
    gone = {label: mark for label, mark in found.items() if not is_held(folder / mark)}
    await _unplug(monitor, [label.removeprefix("exec.") for label in gone])
    for mark in gone.values():
        (folder / mark).unlink(missing_ok=True)
