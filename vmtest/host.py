"""Boots an emulated host: a guest under TCG whose CPUs have AMD's virtualization.

QEMU's TCG emulates SVM with nested paging, so the KVM inside is the kernel's own. Not here: the
host's segments (images.py), its QEMU (boot.py), judging its results (verdict.py).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from onecopy.errors import GuestFailed, OnecopyError
from onecopy.guest.exec import run_captured, run_streaming
from onecopy.guest.exec_streams import Streams
from onecopy.guest.lifecycle.launchplan import BootSpec, LaunchPlan
from onecopy.guest.lifecycle.start import plan_launch, start_one
from onecopy.guest.run_directory import Batch, GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB, Mergeable
from onecopy.subprocesses import run
from onecopy.vmm import end_traces
from onecopy.vmm.accel import Choice
from onecopy.vmm.monitor import connect
from vmtest.images import Images

CPUS = 2
MEMORY = 10240 * MIB
#: The program that runs all others in the host, and its directory of results.
INSIDE = "/opt/onecopy/tree/vmtest/inside"
RESULTS = "/run/results"
#: Attempts to boot a host.
_TRIES = 3
#: Seconds without output after which an emulated host counts as hung. The longest silent test takes
#: two minutes, and three times that on a busy machine.
SILENCE = 480.0


@dataclass(frozen=True, slots=True)
class EmulatedHost:
    """A running emulated host; ``folder`` receives its output and results."""

    run_folder: Path
    folder: Path

    async def call(
        self,
        argv: Sequence[str],
        limit: float,
        tell: Callable[[bytes], None],
        silence: float = SILENCE,
    ) -> int:
        """Run a program in the host and return its exit code.

        Args:
            argv: The program and its arguments.
            limit: Time limit in seconds.
            tell: Receives both outputs, which also go to output.log.
            silence: Seconds without output after which the host counts as hung.

        Raises:
            GuestFailed: The host hangs or ends.
            AgentFailed: Its agent does not answer.
        """
        heard = time.monotonic()
        with (self.folder / "output.log").open("ab") as log:

            def listen(data: bytes) -> None:
                nonlocal heard
                heard = time.monotonic()
                log.write(data)
                log.flush()
                tell(data)

            work = asyncio.ensure_future(
                run_streaming(self.run_folder, argv, Streams(listen, listen), timeout=limit)
            )
            while not work.done():
                await asyncio.wait({work}, timeout=min(5, silence))
                if time.monotonic() - heard > silence and not work.done():
                    work.cancel()
                    with suppress(asyncio.CancelledError, OnecopyError):
                        await work
                    raise GuestFailed(f"the emulated host printed nothing for {silence:g} s")
            return work.result()

    async def processors(self) -> str:
        """Sample the CPUs' instruction pointers three times, to show whether they make progress."""
        said = []
        for _ in range(3):
            try:
                async with (
                    asyncio.timeout(30),
                    connect(self.run_folder) as monitor,
                ):
                    registers = await monitor.human("info registers -a")
            except (TimeoutError, OnecopyError) as error:
                said.append(f"unknown: {error}")
            else:
                said += [line for line in registers.splitlines() if line.startswith("RIP=")]
            await asyncio.sleep(1)
        return "\n".join(said)

    async def fetch(self) -> None:
        """Fetch the results, if there are any."""
        argv = ["tar", "-C", RESULTS, "-cf", "-", "."]
        done = await run_captured(self.run_folder, argv, timeout=300)
        if done.exit_code == 0:
            run(["tar", "-x", "--no-same-owner"], cwd=self.folder, stdin=done.stdout)


@asynccontextmanager
async def emulated_host(
    host: Runtime, images: Images, folder: Path, memory: int = MEMORY
) -> AsyncIterator[EmulatedHost]:
    """Boot an emulated host; at the end, end it and copy its logs to ``folder``, which exists.

    Its batch is never published, so that the next command ends the host if this process is killed.
    """
    prepared = plan_launch(
        host,
        BootSpec(
            root=images.root,
            segments=images.mounted,
            memory=memory,
            cpus=CPUS,
            command="",
            # TCG's maximum includes AMD's virtualization.
            cpu="max",
            accel=Choice.TCG,
            network=False,
            # KSM tests on the machine would otherwise wait until its memory has been scanned.
            ksm=Mergeable.NONE,
        ),
    )
    with host.batch() as batch:
        record = await _booted(host, prepared, batch)
        mine = host.run / record.name
        # By descriptor, because another command may sweep the run directory first.
        with (mine / "console.log").open("rb") as console, (mine / "qemu.log").open("rb") as qemu:
            try:
                async with connect(mine) as monitor:
                    # If a triple fault resets the host, QEMU logs that.
                    await monitor.human("log cpu_reset")
                yield EmulatedHost(mine, folder)
            finally:
                host.end(record)
                (folder / "console.log").write_bytes(console.read())
                (folder / "qemu.log").write_bytes(qemu.read())


async def _booted(host: Runtime, prepared: LaunchPlan, batch: Batch) -> GuestRecord:
    """Boot the host; boot it again if its kernel panicked.

    Linux patches its code while it boots, and under TCG the other CPU can hit the breakpoint of
    such a patch.
    """
    for _ in range(_TRIES - 1):
        try:
            return await start_one(host, prepared, _new_name(), batch)
        except GuestFailed as error:
            if "Kernel panic" not in error.output:
                raise
    return await start_one(host, prepared, _new_name(), batch)


def was_reset(folder: Path) -> bool:
    """Return whether a host that has ended reset itself, by its logs in ``folder``."""
    ended = end_traces.read((folder / "qemu.log").read_text(errors="replace"))
    return ended.in_order and ended.cause is None


def _new_name() -> str:
    return f"vmtest-{secrets.token_hex(3)}"
