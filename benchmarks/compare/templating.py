"""Starts guests from a frozen one without segments, as other projects do: its RAM is mapped
copy-on-write, and its root is a disk.

The guests share the frozen guest's page cache with its RAM. Files that a guest reads later are its
own. The guests have no identity of their own. They are made of the same parts as onecopy's saved
systems (onecopy.guest.lifecycle.save), for a comparison.
"""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from benchmarks.answers import before, free_port, until
from benchmarks.compare.mix import PORT, SHELL, Tell, Ware
from benchmarks.kinds import new_name
from benchmarks.plain import launch_plain, new_plain, start_plain
from benchmarks.setup import Setup
from onecopy.guest.lifecycle.snapshot import Snapshot, Source, take
from onecopy.guest.ports import Ports
from onecopy.guest.run_directory import RunDirectory
from onecopy.vmm.argv import Ram
from onecopy.vmm.monitor import connect
from onecopy.vmm.qemu_process import Vmm


class Templates:
    """The frozen guests, each made on demand."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._made: dict[str, Snapshot] = {}

    async def of(self, ware: Ware) -> Snapshot:
        """Return the frozen guest of an application."""
        name = ware.name
        if name not in self._made:
            self._tell(f"a frozen guest without segments: {name}")
            self._made[name] = await _frozen(ware)
        return self._made[name]

    def files(self) -> list[Path]:
        """Return the RAM files of all frozen guests."""
        return [each.ram for each in self._made.values()]


async def _frozen(ware: Ware) -> Snapshot:
    """Boot a guest and freeze it once its application answers."""
    setup, name, port = ware.setup, new_name(), free_port()
    vmm = start_plain(setup, name, ware.application.command, ((port, PORT), (free_port(), SHELL)))
    try:
        await before(vmm.wait(), until(lambda: ware.ask(port), name))
        work = setup.work / f"{name}.saved"
        work.mkdir()
        source = Source(vmm.pid, setup.prepared.hardware.memory, None)
        return await take(RunDirectory(vmm.folder), source, work, last=True)
    finally:
        await vmm.kill()


async def start_from(template: Snapshot, setup: Setup, name: str, ports: Ports) -> Vmm:
    """Start a guest that continues from the frozen state."""
    spec = replace(
        new_plain(setup, name, ports),
        ram=Ram.COPY_ON_WRITE,
        ram_path=template.ram,
        rom=setup.host.qemu.rom,
    )
    vmm = launch_plain(setup, spec)
    try:
        async with connect(vmm.folder) as monitor:
            with template.state.open("rb") as state:
                await monitor.incoming(state.fileno())
            await monitor.execute("cont")
    except BaseException:
        await vmm.kill()
        raise
    return vmm
