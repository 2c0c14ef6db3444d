"""The emulated host: a cold guest under TCG whose processors have AMD's virtualization.

QEMU's TCG emulates SVM with nested paging, so the KVM inside is the kernel's own, and real. Not
here: what it is made of (images.py), whether what it says is a pass (verdict.py).
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
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
from onecopy.vmm.accel import Choice
from onecopy.vmm.monitor import connect
from vmtest.images import Images

CPUS = 2
MEMORY = 10240 * MIB
#: What runs all else inside, and where that puts its results.
INSIDE = "/opt/onecopy/tree/vmtest/inside"
RESULTS = "/run/results"
#: How often a host is booted until it comes up.
_TRIES = 3
#: Seconds without a word after which an emulated host has hung: the longest silent test takes two
#: minutes, and three times that when the machine is busy.
SILENCE = 480.0


@dataclass(frozen=True, slots=True)
class EmulatedHost:
    """A running one; ``folder`` takes what it says and leaves."""

    run_folder: Path
    folder: Path

    async def call(
        self,
        argv: Sequence[str],
        limit: float,
        tell: Callable[[bytes], None],
        silence: float = SILENCE,
    ) -> int:
        """Run a program inside and return its exit code; ``limit`` and ``silence`` are in seconds.

        Both its outputs go to ``tell`` and to output.log. Raises GuestFailed if the host
        hangs or ends, AgentFailed if its agent does not answer.
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
                    raise GuestFailed(f"the emulated host said nothing for {silence:g} s")
            return work.result()

    async def processors(self) -> str:
        """Where its processors are, three times: whether they stand still."""
        said = []
        for _ in range(3):
            try:
                async with (
                    asyncio.timeout(30),
                    connect(self.run_folder / "monitor.sock") as monitor,
                ):
                    registers = await monitor.human("info registers -a")
            except (TimeoutError, OnecopyError) as error:
                said.append(f"unknown: {error}")
            else:
                said += [line for line in registers.splitlines() if line.startswith("RIP=")]
            await asyncio.sleep(1)
        return "\n".join(said)

    async def fetch(self) -> None:
        """Bring back the results; a host that has none leaves none."""
        argv = ["tar", "-C", RESULTS, "-cf", "-", "."]
        done = await run_captured(self.run_folder, argv, timeout=300)
        if done.exit_code == 0:
            run(["tar", "-x", "--no-same-owner"], cwd=self.folder, stdin=done.stdout)


@asynccontextmanager
async def emulated_host(
    host: Runtime, images: Images, folder: Path, memory: int = MEMORY
) -> AsyncIterator[EmulatedHost]:
    """Boot one; at the end, whatever happened, it is gone and its logs are in ``folder``.

    It is never handed out: killed, we leave it to the next command, which ends it.
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
            # Tests that run KSM beside it would wait until all of it has been looked at.
            ksm=Mergeable.NONE,
        ),
    )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with host.batch() as batch:
        record = await _booted(host, prepared, batch)
        mine = host.run / record.name
        # By descriptor: the run folder may be swept before we have read them.
        with (mine / "console.log").open("rb") as console, (mine / "qemu.log").open("rb") as qemu:
            try:
                yield EmulatedHost(mine, folder)
            finally:
                host.end(record)
                (folder / "console.log").write_bytes(console.read())
                (folder / "qemu.log").write_bytes(qemu.read())


async def _booted(host: Runtime, prepared: LaunchPlan, batch: Batch) -> GuestRecord:
    """Boot; again if the kernel panicked.

    Linux patches its code while it boots, and under TCG the other processor can run into the
    breakpoint of that.
    """
    for _ in range(_TRIES - 1):
        try:
            return await start_one(host, prepared, _new_name(), batch)
        except GuestFailed as error:
            if "Kernel panic" not in error.output:
                raise
    return await start_one(host, prepared, _new_name(), batch)


def _new_name() -> str:
    return f"vmtest-{secrets.token_hex(3)}"
