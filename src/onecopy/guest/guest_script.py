"""Runs onecopy's scripts in a guest: segment and fit of images/files."""

from __future__ import annotations

from pathlib import Path

from onecopy.guest.exec import Completed, run_captured
from onecopy.images.initramfs import TOOLS_MOUNTPOINT
from onecopy.vmm.guest_reply import shown


async def segment(folder: Path, *words: str, timeout: float) -> Completed:
    """Run the script that links, mounts and freezes segments (images/files/segment).

    Args:
        folder: The guest's run directory.
        words: The arguments.
        timeout: Time limit in seconds.

    Raises:
        OnecopyError: Any error of `run_captured`.
    """
    return await _run(folder, "segment", *words, timeout=timeout)


async def fit(folder: Path, *words: str, timeout: float) -> Completed:
    """Run the script that brings added RAM, vCPUs and disks online (images/files/fit)."""
    return await _run(folder, "fit", *words, timeout=timeout)


async def _run(folder: Path, name: str, *words: str, timeout: float) -> Completed:
    return await run_captured(folder, ["sh", f"{TOOLS_MOUNTPOINT}/{name}", *words], timeout=timeout)


def said(done: Completed) -> str:
    """Return the error text of a failed script, without its ID."""
    last = (done.stderr or done.stdout).strip().rpartition(b"\n")[2]
    text = shown(last.partition(b": ")[2] or last)
    return text or f"exit code {done.exit_code}"
