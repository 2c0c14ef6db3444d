"""What makes a clone a machine of its own: name and machine-id; nothing is handed out without.

Not through the guest agent: its first answer alone makes a clone run some ten thousand blocks of
code that it has not run yet, which under TCG takes longer than all the rest of a start. A shell of
ours that already waits in the saved system (build/files/identity) needs a tenth of that.

The kernel's random numbers are re-seeded by the vmgenid device, before the guest runs on (Linux
Documentation/devicetree/bindings/rng/microsoft,vmgenid.yaml; drivers/virt/vmgenid.c).
"""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

from onecopy.errors import AgentFailed
from onecopy.vmm.pipe import Pipe

#: Seconds a guest may take to answer.
TIMEOUT = 30.0


async def become(folder: Path, name: str, *, machine_id: bool) -> None:
    """Give the clone its hostname and machine-id; raise AgentFailed unless it confirms them."""
    wanted = f"{name} {secrets.token_hex(16) if machine_id else '-'}"
    answer = await _ask(folder, f"be {wanted}")
    if answer != wanted:
        raise AgentFailed(f"the clone should be {wanted} but says it is {answer!r}")


async def rehearse(folder: Path, name: str, machine_id: str | None) -> None:
    """Let a guest that is about to be saved become what it is already, and get ready again.

    What this touches for the first time is then in the saved system, and not each clone's own.
    Raises AgentFailed.
    """
    # A machine-id may have come into being since the guest last got ready.
    prepare = ("prepare", "prepared")
    whole = f"{name} {machine_id or '-'}"
    for line, expected in (prepare, (f"be {whole}", whole), prepare):
        answer = await _ask(folder, line)
        if answer != expected:
            raise AgentFailed(f"asked to {line!r} the guest says {answer!r}")


async def _ask(folder: Path, line: str) -> str:
    try:
        async with asyncio.timeout(TIMEOUT):
            with Pipe(folder, "identity") as pipe:
                await pipe.write(f"{line}\n".encode())
                return (await pipe.until(b"\n")).decode(errors="replace")
    except TimeoutError:
        raise AgentFailed(
            f"the guest did not confirm its identity within {TIMEOUT:g} s",
            hint="`onecopy logs` shows its console; save the system again if this goes on",
        ) from None
