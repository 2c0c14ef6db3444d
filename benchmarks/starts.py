"""Measures one start: of a bare `qemu -S`, of a clone, and of the whole command.

All kinds take turns, so that load on the host affects all. A clone is started by the real
start_one(), whose phases are observed from outside. Not here: booted guests (kinds.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from msgspec.structs import replace

from benchmarks.answers import answered
from benchmarks.figures import Spread
from benchmarks.kinds import new_name
from benchmarks.setup import Setup, without_network
from onecopy.guest import identity
from onecopy.guest.lifecycle import launcher
from onecopy.guest.lifecycle.launchplan import LaunchPlan
from onecopy.guest.lifecycle.start import start_one
from onecopy.guest.ports import Ports
from onecopy.guest.run_directory import POOL
from onecopy.subprocesses import environment
from onecopy.vmm import monitor
from onecopy.vmm.monitor import Monitor, connect
from onecopy.vmm.qemu_process import launch

#: The moments of a start, in order; each is in seconds since spawning QEMU.
MOMENTS = {
    "greeting": "QEMU has sent its greeting (QMP)",
    "loading": "QEMU was told to load the state",
    "loaded": "the state is loaded",
    "running": "`cont` has returned: the guest runs",
    "confirmed": "the guest has confirmed its identity",
    "handed out": "the guest is ready",
    "answered": "the application has answered over HTTP",
}
#: QMP command -> the moment at which it is sent.
_BEFORE = {"migrate-incoming": "loading", "cont": "loaded"}


@dataclass(frozen=True, slots=True)
class Starts:
    """Seconds."""

    empty: Spread
    """`qemu -machine none -S` until its first QMP answer: without any machine."""
    bare: Spread
    """`qemu -S` until its first QMP answer."""
    alone: dict[str, Spread]
    """As ``moments``, of a clone without a network card."""
    moments: dict[str, Spread]
    """MOMENTS of a clone, in seconds since spawning QEMU."""
    phases: dict[str, Spread]
    """The same, each from the one before."""
    command: Spread
    """`onecopy run SYSTEM` until it exits, with the start of Python."""
    prepared: dict[str, Spread]
    """As ``moments``, of a standby clone (`onecopy pool`), since the request."""
    prepared_command: Spread
    """As ``command``, with a standby clone."""


async def measure_starts(setup: Setup, count: int, tell: Callable[[str], None]) -> Starts:
    """Measure ``count`` starts of each kind, in turn, after one of each that warms up the host."""
    lonely = await without_network(setup, tell)
    empty, bare, alone, clones, command = [], [], [], [], []
    prepared, prepared_command = [], []
    for number in range(count + 1):
        tell(f"one start, {number} of {count}")
        empty.append(_bare(setup, ["-machine", "none"]))
        bare.append(_bare(setup, _machine(setup)))
        alone.append(await _clone(setup, lonely))
        clones.append(await _clone(setup, setup.saved, ((0, 80),)))
        command.append(_command(setup))
        await _prepare_one(setup)
        prepared.append(await _clone(setup, setup.saved, ((0, 80),)))
        await _prepare_one(setup)
        prepared_command.append(_command(setup))
    steps = [dict(_steps(clone)) for clone in clones[1:]]
    return Starts(
        empty=Spread.of(empty[1:]),
        bare=Spread.of(bare[1:]),
        alone=_spreads(alone[1:]),
        moments=_spreads(clones[1:]),
        phases=_spreads(steps),
        command=Spread.of(command[1:]),
        prepared=_spreads(prepared[1:]),
        prepared_command=Spread.of(prepared_command[1:]),
    )


async def _prepare_one(setup: Setup) -> None:
    """Prepare one standby clone, without a pool that is refilled."""
    with setup.host.batch() as batch:
        await start_one(setup.host, replace(setup.saved, standby=True), f"{POOL}bench", batch)
        batch.hand_out()
    # QEMU frees its buffers for loading the state a little later.
    await asyncio.sleep(1)


def _spreads(clones: list[dict[str, float]]) -> dict[str, Spread]:
    return {key: Spread.of(clone[key] for clone in clones) for key in clones[0]}


def _steps(clone: dict[str, float]) -> Iterator[tuple[str, float]]:
    last = 0.0
    for key, moment in clone.items():
        yield key, moment - last
        last = moment


def _machine(setup: Setup) -> list[str]:
    """Return an empty machine of the same type and CPU."""
    hardware = setup.saved.hardware
    argv = ["-machine", hardware.machine, "-accel", setup.saved.accel.name]
    return [*argv, "-cpu", hardware.cpu, "-m", "256M"]


def _bare(setup: Setup, machine: list[str]) -> float:
    """Start QEMU with a machine that never runs: the lower bound of any start."""
    path = setup.work / "bare.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        fd = listener.fileno()
        binary = setup.host.qemu.binary
        argv = [binary, "-nodefaults", "-no-user-config", "-display", "none", "-S", *machine]
        argv += ["-mon", "chardev=monitor,mode=control"]
        argv += ["-chardev", f"socket,id=monitor,fd={fd},server=on,wait=off"]
        began = time.monotonic()
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, pass_fds=(fd,), env=environment()
        )
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            # The greeting comes before the machine exists, so an answer counts.
            client.sendall(b'{"execute": "qmp_capabilities"} {"execute": "query-status"}')
            said = b""
            while b'"running"' not in said:
                said += (data := client.recv(65536))
                if not data:
                    raise RuntimeError(f"QEMU ended with the output {said!r}")
            return time.monotonic() - began
    finally:
        process.kill()
        process.wait()
        path.unlink()


async def _clone(setup: Setup, system: LaunchPlan, publish: Ports = ()) -> dict[str, float]:
    """Return the moments of a clone; the last one only if it publishes a port."""
    name = new_name()
    with _watched() as marks:
        asked = time.monotonic()
        record = await start_one(setup.host, system.varied(publish=publish), name)
        marks["handed out"] = time.monotonic()
    try:
        if publish:
            await answered(record.publish[0][0], name)
            marks["answered"] = time.monotonic()
    finally:
        setup.host.end(record)
    began = marks.get("spawn", asked)
    return {key: marks[key] - began for key in MOMENTS if key in marks}


@contextlib.contextmanager
def _watched() -> Iterator[dict[str, float]]:
    """Record when start_one() goes from one phase to the next."""
    marks: dict[str, float] = {}
    become, execute = identity.become, Monitor.execute

    def launching(*args: Any, **options: Any) -> Any:
        marks["spawn"] = time.monotonic()
        return launch(*args, **options)

    @contextlib.asynccontextmanager
    async def connecting(directory: Path) -> AsyncIterator[Monitor]:
        async with connect(directory) as connection:
            marks["greeting"] = time.monotonic()
            yield connection

    async def executing(self: Monitor, command: str, arguments: Any = None) -> Any:
        if command in _BEFORE:
            marks[_BEFORE[command]] = time.monotonic()
        result = await execute(self, command, arguments)
        if command == "cont":
            marks["running"] = time.monotonic()
        return result

    async def becoming(*args: Any, **options: Any) -> str:
        address = await become(*args, **options)
        marks["confirmed"] = time.monotonic()
        return address

    with (
        patch.object(launcher, "launch_vmm", launching),
        patch.object(monitor, "connect", connecting),
        patch.object(Monitor, "execute", executing),
        patch.object(identity, "become", becoming),
    ):
        yield marks


def _command(setup: Setup) -> float:
    """Return the wall time of the command, which leaves the guest running."""
    name = new_name()
    program = Path(sys.executable).with_name("onecopy")
    env = {**os.environ, "ONECOPY_HOME": str(setup.host.store.root)}
    # As in an installation: the first run compiles the modules, and the others load the bytecode.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.monotonic()
    subprocess.run(
        [program, "run", "--name", name, setup.saved.source.ref],
        env=env,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    seconds = time.monotonic() - began
    setup.host.end(setup.host.guest(name).record())
    return seconds
