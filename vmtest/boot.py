"""Boots an emulated host and runs one job in it: `python -m vmtest.boot JOB`.

It runs in Debian 13's root on this host's kernel (root.py), because an emulated host needs that
QEMU: Debian 12's emulates SVM less well. Not here: how a host boots (host.py), the jobs (jobs.py).
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from onecopy.errors import GuestFailed, OnecopyError
from onecopy.guest.runtime import Runtime
from tests.vm.kept import kept_store
from vmtest.host import RESULTS, SILENCE, EmulatedHost, emulated_host, was_reset
from vmtest.images import RELEASES, Images, ensure_base, store_root
from vmtest.root import run_in_root

#: The release whose root and QEMU this needs.
_RELEASE = RELEASES[13]
#: Time limit of a job in an emulated host, in seconds.
_LIMIT = 7200.0


@dataclass(frozen=True, slots=True)
class Job:
    """A program to run in an emulated host."""

    images: Images
    memory: int
    """Bytes of the host's RAM."""
    argv: Sequence[str]
    silence: float = SILENCE
    """Seconds without output after which the host counts as hung."""

    def run(self, host: Runtime, results: Path) -> int:
        """Run it in the root of Debian 13; return its exit code. ``results`` is a directory."""
        base = ensure_base(host, _RELEASE, tell)
        # No Debian mirror can be reached from there.
        with kept_store(hosts=(_RELEASE.suite,)) as kept:
            kept.copy(host.store.root)
        argv = ["python", "-m", "vmtest.boot", msgspec.json.encode(self).decode()]
        return run_in_root(host.store, base.named, results, argv)


def tell(text: str) -> None:
    """Print a progress line."""
    print(f"test-kvm: {text}", file=sys.stderr, flush=True)


async def _run(job: Job) -> int:
    task = asyncio.current_task()
    if task:
        # End the emulated host, as on Ctrl-C.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    host = Runtime.open(store_root())
    try:
        try:
            return await _attempt(host, job)
        except GuestFailed:
            if not was_reset(Path(RESULTS)):
                raise
            tell("the host reset itself, which is a fault of its emulation: once more")
            return await _attempt(host, job)
    except OnecopyError as error:
        tell(f"{error.message}\n{error.hint}".rstrip())
        return error.exit_code


async def _attempt(host: Runtime, job: Job) -> int:
    began = time.monotonic()
    try:
        async with emulated_host(host, job.images, Path(RESULTS), job.memory) as emulated:
            took = time.monotonic() - began
            tell(f"QEMU {host.qemu.version}: the host was up after {took:.0f} s")
            return await _call(emulated, job)
    finally:
        tell(f"the host ended after {time.monotonic() - began:.0f} s")


async def _call(emulated: EmulatedHost, job: Job) -> int:
    try:
        code = await emulated.call(job.argv, _LIMIT, _show, job.silence)
    except (OnecopyError, asyncio.CancelledError) as error:
        if isinstance(error, OnecopyError):
            tell(f"the host's CPUs are at:\n{await emulated.processors()}")
        # What there is so far. The first error matters more than one of fetching.
        with suppress(OnecopyError):
            await emulated.fetch()
        raise
    await emulated.fetch()
    return code


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def main() -> int:
    """Run the job; return its exit code, or that of the error."""
    try:
        return asyncio.run(_run(msgspec.json.decode(sys.argv[1], type=Job)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130


if __name__ == "__main__":
    sys.exit(main())
