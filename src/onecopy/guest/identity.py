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
import time
from pathlib import Path

from onecopy.errors import AgentFailed
from onecopy.vmm.pipe import Pipe

#: Seconds a clone may take to confirm.
TIMEOUT = 30.0


async def become(folder: Path, name: str, *, machine_id: bool) -> None:
    """Give the clone its hostname, machine-id and the time; raise AgentFailed unless confirmed."""
    wanted = secrets.token_hex(16) if machine_id else "-"
    line = f"{name} {wanted} {time.time():.3f}\n"
    try:
        async with asyncio.timeout(TIMEOUT):
            with Pipe(folder, "identity") as pipe:
                await pipe.write(line.encode())
                answer = (await pipe.until(b"\n")).decode(errors="replace")
    except TimeoutError:
        raise AgentFailed(
            f"the clone did not confirm its identity within {TIMEOUT:g} s",
            hint="`onecopy logs` shows its console; save the system again if this goes on",
        ) from None
    if answer.split() != [name, wanted]:
        raise AgentFailed(f"the clone should be {name} {wanted} but says it is {answer!r}")
