"""Gives a clone its own identity, and requires the guest to confirm it.

The identity is: hostname and machine-id, MAC and IP address, clock, random numbers, SSH host keys
if the image has any, and the state that clone hooks renew (guest/lifecycle/clone_hooks.py). A small
program that waits in the saved system does this (images/files/identity.c). The guest agent would be
slower: for its first answer alone a clone runs ten thousand new blocks of code, which under TCG
takes longer than the rest of the start.

The vmgenid device makes the kernel re-seed its random generator when the clone starts. The guest
waits until its kernel has logged that.

Source: Linux drivers/virt/vmgenid.c, drivers/char/random.c.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from onecopy.errors import AgentFailed
from onecopy.guest import ssh_host_keys
from onecopy.vmm.argv import Nic, guest_network
from onecopy.vmm.guest_reply import address, decimal, shown
from onecopy.vmm.port_pipe import Pipe

#: Seconds for an answer of the guest.
TIMEOUT = 60.0
#: Seconds for new SSH host keys and the clone hooks.
HOOK_TIMEOUT = 300.0
#: The longest answer in bytes.
_LIMIT = 4096
#: The largest error of the guest's clock in seconds.
_CLOCK = 5
#: Answers that interrupted commands may have left, and how many of them to skip.
_ANSWERS, _STALE = ("prepared", "calm", "frozen", "thawed"), 16
#: Request -> its text in messages; any other request sets the identity.
_DOING = {"freeze": "freeze its programs", "calm": "stop its calendar timers"}
#: The guest's word for a failed step -> its text in messages.
_FAILURES = {
    "files": "write its name, or machine-id, into a file",
    "network": "set up its network card",
    "clock": "set its clock",
    "random": "re-seed its kernel's random generator",
    "timers": "stop its calendar timers: its systemd does not answer",
    "freeze": "freeze its programs",
    "keys": "make SSH host keys of its own",
    "hook": "run its clone hooks",
    "renew": "run a step of its new identity",
}


class Identity(msgspec.Struct, frozen=True):
    """The identity of a guest."""

    name: str
    """Name and hostname."""
    machine_id: str | None
    """machine-id(5), 32 hexadecimal digits; None for a guest without one."""
    card: Nic | None
    """The network card; None for none."""


async def become(folder: Path, wanted: Identity, connect: Callable[[], None] = lambda: None) -> str:
    """Give a clone its identity.

    Args:
        folder: The clone's run directory.
        wanted: Its identity.
        connect: Connects the card to its bridge. Called once the clone no longer uses the saved
            addresses, before it asks for an address by DHCP.

    Returns:
        The clone's IP address; "" without a network.

    Raises:
        AgentFailed: The guest does not confirm the identity.
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
    """Make a guest that is about to be saved set the identity it has already.

    The pages that this touches for the first time are then part of the saved system, and not each
    clone's own. It sets clock, hostname and network card. Therefore it is only for a guest that is
    not in use yet.

    Raises:
        AgentFailed: The guest does not confirm the identity.
    """
    with Pipe(folder, "identity") as pipe:
        pipe.drain()
        # The guest may have made a machine-id since it last prepared.
        await _prepare(pipe, card=mine.card is not None)
        asked = time.time()
        _confirmed(await _ask(pipe, _line("rehearse", mine), TIMEOUT), mine, asked)
        await _prepare(pipe, card=mine.card is not None)
        # Without calendar timers the guest becomes idle.
        await ask(pipe, "calm", "calm", HOOK_TIMEOUT)


async def prepare(folder: Path, *, card: bool) -> None:
    """Prepare a guest for a save, without changing its identity.

    Args:
        folder: The guest's run directory.
        card: Whether the machine has a network card.

    Raises:
        AgentFailed: The guest cannot be saved, or does not answer.
    """
    with Pipe(folder, "identity") as pipe:
        pipe.drain()
        await _prepare(pipe, card=card)


async def _prepare(pipe: Pipe, *, card: bool) -> None:
    await ask(pipe, f"prepare {card:d}", "prepared", TIMEOUT)


async def ask(pipe: Pipe, line: str, answer: str, timeout: float) -> str:
    """Send a request, and wait for the answer that begins with ``answer``.

    Answers to requests of interrupted commands are skipped.

    Returns:
        The rest of the answer.

    Raises:
        AgentFailed: The guest reports a failure or does not answer in time.
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
    raise AgentFailed(f"the guest answered the request {line!r} with {shown(said)!r}")


def _line(verb: str, wanted: Identity) -> str:
    mac = wanted.card.mac if wanted.card else "-"
    now = time.time_ns() // 1_000_000
    who = f"{wanted.name} {wanted.machine_id or '-'}"
    return f"{verb} {who} {now} {mac} {guest_network(wanted.card)}"


def _confirmed(said: str, wanted: Identity, asked: float) -> str:
    """Check that the guest has the wanted identity; return its IP address, "" without a network.

    ``asked`` is the time of the request (time.time()). A guest of a busy host sets its clock late.
    """
    name, machine_id, mac, where, now = [*said.split(), *[""] * 5][:5]
    if name == "failed":
        raise _failed(said)
    expected = (wanted.name, wanted.machine_id or "-", wanted.card.mac if wanted.card else "-")
    if (name, machine_id, mac) != expected:
        raise AgentFailed(
            f"the guest reports the identity {shown(said)!r}, not {' '.join(expected)!r}"
        )
    clock = decimal(now, f"the clock of {wanted.name}", most=1 << 48)
    if not asked - _CLOCK <= clock / 1000 <= time.time() + _CLOCK:
        raise AgentFailed(
            f"the clock of {wanted.name} is wrong by more than {_CLOCK} s: it is at {clock} ms"
        )
    return "" if where == "-" else address(where, f"the address of {wanted.name}")


def _failed(said: str) -> AgentFailed:
    """Return the error for an answer ``failed WHAT DETAILS``."""
    _, what, details = [*said.split(" ", 2), "", ""][:3]
    doing = _FAILURES.get(what, f"take its new identity ({shown(said)!r})")
    return AgentFailed(
        f"the guest could not {doing}{': ' if details else ''}{shown(details)}",
        hint="saving and cloning need this step: boot the root segment with `onecopy boot` "
        "and correct the cause there",
    )


async def _ask(pipe: Pipe, line: str, timeout: float) -> str:
    """Send ``line`` unless it is empty; return the guest's next line."""
    try:
        async with asyncio.timeout(timeout):
            if line:
                await pipe.write(f"{line}\n".encode())
            return (await pipe.until(b"\n", _LIMIT)).decode(errors="replace")
    except TimeoutError:
        raise AgentFailed(
            f"the guest did not {_DOING.get(line, 'confirm its identity')} within {timeout:g} s",
            hint="look at its console, above or with `onecopy logs GUEST`; "
            "save the system again if the error persists",
        ) from None
