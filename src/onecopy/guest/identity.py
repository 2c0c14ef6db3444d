"""What makes a clone a machine of its own; nothing is handed out without.

Name and machine-id, in the kernel and in files; address of its network card and of IP, clock,
random numbers; SSH host keys if the image has some; and what clone hooks do
(guest/lifecycle/clone_hooks.py). Not through the guest agent: its first answer alone makes a clone
run some ten thousand blocks of code that it has not run yet, which under TCG takes longer than all
the rest of a start. A small program of ours that already waits in the saved system
(images/files/identity.c) needs a fraction of that.

The kernel's random numbers are re-seeded by the vmgenid device when the guest runs on (Linux
drivers/virt/vmgenid.c); the guest waits until its kernel has said so (drivers/char/random.c).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from onecopy.errors import AgentFailed
from onecopy.guest import ssh_host_keys
from onecopy.guest.network import settings
from onecopy.vmm.argv import Nic
from onecopy.vmm.guest_reply import address, decimal, shown
from onecopy.vmm.port_pipe import Pipe

#: Seconds a guest may take to answer.
TIMEOUT = 60.0
#: Seconds that new SSH host keys and the clone hooks may take.
HOOK_TIMEOUT = 300.0
#: Bytes that an answer may have.
_LIMIT = 4096
#: Seconds by which the clock that the guest reads back may differ.
_CLOCK = 5
#: Answers that may be left of commands that were interrupted, and how many at most.
_ANSWERS, _STALE = ("prepared", "calm", "frozen", "thawed"), 16
#: What it is asked for besides its identity.
_DOING = {"freeze": "let its programs stand still", "calm": "stop its calendar timers"}
#: What the guest says could not be done.
_FAILURES = {
    "files": "write its name, or machine-id, into a file",
    "network": "set up its network card",
    "clock": "set its clock",
    "random": "re-seed its kernel's random numbers",
    "timers": "stop its calendar timers: its systemd does not answer",
    "freeze": "let its programs stand still",
    "keys": "make SSH host keys of its own",
    "hook": "run its clone hooks",
    "renew": "run what makes it another machine",
}


class Identity(msgspec.Struct, frozen=True):
    """Who a guest is to be."""

    name: str
    machine_id: str | None
    card: Nic | None


def new_identity(name: str, card: Nic | None, *, machine_id: bool) -> Identity:
    """Who a new clone is to be."""
    return Identity(name, secrets.token_hex(16) if machine_id else None, card)


async def become(folder: Path, wanted: Identity, connect: Callable[[], None] = lambda: None) -> str:
    """Make the clone who it is to be; raise AgentFailed unless it confirms all of it.

    Returns its IP address, "" without a network. ``connect`` connects its card to a network where
    it asks for an address, once it sends nothing more as who was saved.
    """
    with Pipe(folder, "identity") as pipe:
        asked = time.time()
        said = await _ask(pipe, _line("be", wanted), TIMEOUT)
        if said == "apart":
            connect()
            said = await _ask(pipe, "go on", TIMEOUT)
        where = _confirmed(said, wanted, asked)
        said = await _ask(pipe, "", HOOK_TIMEOUT)
        if said != "ready":
            raise _failed(said)
        return where


async def rehearse(folder: Path, mine: Identity) -> None:
    """Let a guest that is about to be saved become what it is already, and get ready again.

    What this touches for the first time is then in the saved system, and not each clone's own.
    It sets its clock, name and network card: that is for a guest of which nobody knows yet. Raises
    AgentFailed.
    """
    with Pipe(folder, "identity") as pipe:
        pipe.drain()
        # A machine-id may have come into being since the guest last got ready.
        await _prepare(pipe, card=mine.card is not None)
        asked = time.time()
        _confirmed(await _ask(pipe, _line("rehearse", mine), TIMEOUT), mine, asked)
        await _prepare(pipe, card=mine.card is not None)
        # So that it can come to rest after that.
        await ask(pipe, "calm", "calm", HOOK_TIMEOUT)


async def prepare(folder: Path, *, card: bool) -> None:
    """Let a guest get ready to be saved, of which nothing else changes.

    It must have a network card if the machine has one (``card``). Raises AgentFailed.
    """
    with Pipe(folder, "identity") as pipe:
        pipe.drain()
        await _prepare(pipe, card=card)


async def _prepare(pipe: Pipe, *, card: bool) -> None:
    await ask(pipe, f"prepare {card:d}", "prepared", TIMEOUT)


async def ask(pipe: Pipe, line: str, answer: str, timeout: float) -> str:
    """Have the guest answer ``answer``, and return what else that line says; raise AgentFailed.

    Answers to what an interrupted command has asked are passed over.
    """
    said = await _ask(pipe, line, timeout)
    for _ in range(_STALE):
        word, _, rest = said.partition(" ")
        if word == answer:
            return rest
        if word not in _ANSWERS:
            raise (
                ssh_host_keys.refusal(said)
                if said.startswith(ssh_host_keys.FAILED)
                else _failed(said)
            )
        said = await _ask(pipe, "", timeout)
    raise AgentFailed(f"asked to {line} the guest says {shown(said)!r}")


def _line(verb: str, wanted: Identity) -> str:
    mac = wanted.card.mac if wanted.card else "-"
    now = time.time_ns() // 1_000_000
    who = f"{wanted.name} {wanted.machine_id or '-'}"
    return f"{verb} {who} {now} {mac} {settings(wanted.card)}"


def _confirmed(said: str, wanted: Identity, asked: float) -> str:
    """The address of what the guest was to become; raise AgentFailed if it is not that.

    It was ``asked`` to (time.time()) with the time of then, which a busy host lets it set late.
    """
    name, machine_id, mac, where, now = [*said.split(), *[""] * 5][:5]
    if name == "failed":
        raise _failed(said)
    expected = (wanted.name, wanted.machine_id or "-", wanted.card.mac if wanted.card else "-")
    if (name, machine_id, mac) != expected:
        raise AgentFailed(
            f"the guest should be {' '.join(expected)} but says it is {shown(said)!r}"
        )
    clock = decimal(now, f"the clock of {wanted.name}", most=1 << 48)
    if not asked - _CLOCK <= clock / 1000 <= time.time() + _CLOCK:
        raise AgentFailed(f"the clock of {wanted.name} is not right: it says {clock}")
    return "" if where == "-" else address(where, f"the address of {wanted.name}")


def _failed(said: str) -> AgentFailed:
    """The error for ``failed WHAT DETAILS``."""
    _, what, details = [*said.split(" ", 2), "", ""][:3]
    doing = _FAILURES.get(what, f"become what it should ({shown(said)!r})")
    return AgentFailed(
        f"the guest could not {doing}{': ' if details else ''}{shown(details)}",
        hint="a clone is handed out, and a guest saved, only if it can: `onecopy boot` its "
        "root segment to see what is wrong",
    )


async def _ask(pipe: Pipe, line: str, timeout: float) -> str:
    """The next line of the guest's, after ``line`` if there is one."""
    try:
        async with asyncio.timeout(timeout):
            if line:
                await pipe.write(f"{line}\n".encode())
            return (await pipe.until(b"\n", _LIMIT)).decode(errors="replace")
    except TimeoutError:
        raise AgentFailed(
            f"the guest did not {_DOING.get(line, 'confirm its identity')} within {timeout:g} s",
            hint="its console tells more: see above, or `onecopy logs GUEST`; "
            "save the system again if this goes on",
        ) from None
