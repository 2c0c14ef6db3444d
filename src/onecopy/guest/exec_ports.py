"""The virtio ports that a program in a guest has for its streams, plugged in for it alone.

A machine has a fixed number of them: who finds none left waits until another program ends. Not
here: what goes over them (exec.py).
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

#: Seconds that taking the ports of a program out may take, and when it is time for nothing else.
_PATIENCE, HURRY = 10.0, 1.5
#: Seconds between looks for a port that has become free: the first ones, and the later ones.
_SOON, _LATER = 0.05, 1.0
#: QEMU's words when there is none (hw/char/virtio-serial-bus.c).
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
    """Plug in one port for each stream, and take them out again, while ``ending`` is done.

    Meanwhile the file of this tag is locked: that tells its ports from those of a killed command.
    Raises NoSlot when ``deadline`` comes before there is a port, GuestFailed.
    """
    names = [f"{tag}.{name}" for name in (["in"] if stdin else []) + ["out", "err"]]
    mark, ours, patience = folder / f"exec.{tag}", Ports(), _PATIENCE
    async with locked(mark):
        try:
            await _plug_all(folder, names, ours, deadline)
            yield {name.rpartition(".")[2]: port for name, port in ours.items()}
        except BaseException:
            patience = HURRY
            raise
        finally:
            try:
                await asyncio.gather(_take_out(folder, list(ours), patience), ending())
            finally:
                mark.unlink(missing_ok=True)
                for port in ours.values():
                    port.close()


async def _plug_all(folder: Path, names: Sequence[str], ours: Ports, deadline: Deadline) -> None:
    """Have all of ``names`` in ``ours``, or none of them: half of them would help nobody."""
    delay, found_none = _SOON, False
    try:
        while not await _try(folder, names, ours):
            found_none = True
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LATER)
    except asyncio.CancelledError:
        if not found_none or deadline.left() != 0:
            raise
        # Its time is up, and this is why.
        raise NoSlot(
            f"{folder.name} has no port left for the streams of a program: other programs run in "
            "it by exec, and none of them ended in time",
            hint="wait for them, or give a longer --timeout",
        ) from None


async def _try(folder: Path, names: Sequence[str], ours: Ports) -> bool:
    """Whether there was room for all."""
    async with connect(folder / "monitor.sock") as monitor:
        await _remove_abandoned(monitor, folder)
        try:
            for name in names:
                await _plug(monitor, name, ours)
        except GuestFailed as error:
            if not any(words in error.message for words in _FULL):
                raise
            await _unplug(monitor, list(ours))
            while ours:
                ours.popitem()[1].close()
    return bool(ours)


async def _plug(monitor: Monitor, name: str, ours: Ports) -> None:
    ours[name], theirs = socket.socketpair()
    ours[name].setblocking(False)
    identity = f"exec.{name}"
    with theirs:
        await monitor.give_fd(theirs.fileno(), identity)
    address = {"type": "fd", "data": {"str": identity}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    await monitor.execute("chardev-add", {"id": identity, "backend": backend})
    device = {"driver": "virtserialport", "bus": "serial.0", "id": EXEC_PORT + name}
    await monitor.execute("device_add", {**device, "chardev": identity, "name": name})


async def _take_out(folder: Path, names: Sequence[str], seconds: float) -> None:
    """In vain if QEMU is gone, or does not answer; the next command does what is left then."""
    if names:
        with contextlib.suppress(GuestFailed, TimeoutError):
            async with asyncio.timeout(seconds), connect(folder / "monitor.sock") as monitor:
                await _unplug(monitor, names)


async def _unplug(monitor: Monitor, names: Sequence[str]) -> None:
    for name in names:
        with contextlib.suppress(GuestFailed):
            await monitor.execute("device_del", {"id": EXEC_PORT + name})
    for name in names:
        await _remove_chardev(monitor, f"exec.{name}")


async def _remove_chardev(monitor: Monitor, label: str) -> None:
    """QEMU lets go of it some milliseconds after its device (util/rcu.c)."""
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
    """Take out the ports of commands that were killed."""
    chardevs = await monitor.ask("query-chardev", list[_Chardev])
    # A label becomes the name of a file of ours: no other than we give is one.
    found = {each.label: found[1] for each in chardevs if (found := _LABEL.fullmatch(each.label))}
    gone = {label: mark for label, mark in found.items() if not is_held(folder / mark)}
    await _unplug(monitor, [label.removeprefix("exec.") for label in gone])
    for mark in gone.values():
        (folder / mark).unlink(missing_ok=True)
