"""The scripts by which a guest does its part with what it is given (images/files: segment, fit)."""

from __future__ import annotations

from pathlib import Path

from onecopy.guest.exec import Completed, run_captured
from onecopy.images.initramfs import TOOLS_MOUNTPOINT
from onecopy.vmm.guest_reply import shown


async def segment(folder: Path, *words: str, timeout: float) -> Completed:
    """Run it in the guest of a run folder, for up to ``timeout`` seconds; raises as `exec` does."""
    return await _run(folder, "segment", *words, timeout=timeout)


async def fit(folder: Path, *words: str, timeout: float) -> Completed:
    """The same for what a guest gets at its start."""
    return await _run(folder, "fit", *words, timeout=timeout)


async def _run(folder: Path, name: str, *words: str, timeout: float) -> Completed:
    return await run_captured(folder, ["sh", f"{TOOLS_MOUNTPOINT}/{name}", *words], timeout=timeout)


def said(done: Completed) -> str:
    """What a script that failed says of it, without the id."""
    last = (done.stderr or done.stdout).strip().rpartition(b"\n")[2]
    text = shown(last.partition(b": ")[2] or last)
    return text or f"exit code {done.exit_code}"
