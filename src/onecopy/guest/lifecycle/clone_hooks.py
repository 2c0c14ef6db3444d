"""What clones run before they are handed out, and the generators that make it necessary.

A random generator outside the guest's kernel is part of the saved state: all clones draw the same
values from it, request after request. `save` finds the programs that hold one (images/files:
generators), and clone hooks (clone, hooks/) have them seeded again. What a guest says of its
programs is bounded here. Not here: what each clone does without being asked (guest/identity.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from onecopy.errors import GuestFailed, InvalidInput
from onecopy.guest.exec import Completed, run_captured
from onecopy.guest.guest_script import said
from onecopy.guest.machine import Generator
from onecopy.images.initramfs import TOOLS_MOUNTPOINT
from onecopy.images.tools import ready_hooks
from onecopy.vmm.guest_reply import decimal, shown

#: Takes the ready hooks of all programs that were found.
AUTO = "auto"
#: Takes none, also where the guest has some from its own saved system.
NONE = "none"
#: Each clone gets host keys of its own, at which OpenSSH's server starts itself anew (renew).
_KEYS = "SSH host keys"
_UNIT = ".service"
#: Tabs in a line about a generator.
_TABS = 5
#: Entries of each kind that a guest may tell, and characters of a word.
_MOST = 100
_WORD = 80
#: Seconds that the guest may take.
_TIMEOUT = 120.0
_FORM = re.compile(r"[a-z][a-z-]*|restart:[\w@:.\\-]+|signal:[A-Z0-9+]+:[\w@.+*-]+", re.ASCII)


class Found(msgspec.Struct, frozen=True):
    """What a guest has told."""

    runs: tuple[str, ...] = ()
    generators: tuple[Generator, ...] = ()


def checked(texts: Iterable[str] | None) -> tuple[str, ...] | None:
    """Return what a user typed if all can be clone hooks; raise InvalidInput."""
    return None if texts is None else tuple(check_hook(each) for each in texts)


def check_hook(text: str) -> str:
    """Return what can be a clone hook; raise InvalidInput."""
    ready = ready_hooks()
    if not _FORM.fullmatch(text) or (":" not in text and text not in (AUTO, NONE, *ready)):
        raise InvalidInput(
            f"{shown(text)!r} is no clone hook",
            hint=f"one of {', '.join(ready)}, {AUTO}, {NONE}, restart:UNIT, restart:PROGRAM or "
            "signal:NAME:PROGRAM",
        )
    return text


async def hooked(
    folder: Path, wanted: Sequence[str] | None, progress: Callable[[str], None]
) -> Found:
    """Choose the clone hooks of the guest of a run folder, and look for generators in it.

    ``wanted`` None leaves those that it has. Raises InvalidInput for a hook that it cannot have,
    AgentFailed, GuestFailed.
    """
    if wanted is not None:
        # Each look takes the guest seconds under TCG.
        found = await _look(folder) if AUTO in wanted else Found()
        await _choose(folder, wanted, found, progress)
    return await _look(folder)


async def _look(folder: Path) -> Found:
    done = await _clone(folder, "look")
    if done.exit_code:
        raise GuestFailed(f"the guest does not tell what its programs are: {said(done)}")
    return read(done.stdout)


def read(told: bytes) -> Found:
    """Read what a guest tells (images/files/clone, look); raise AgentFailed."""
    lines = told.decode(errors="replace").splitlines()
    runs = [shown(line[5:], _WORD) for line in lines if line.startswith("runs ")]
    rows = [line.split("\t") for line in lines if line.count("\t") == _TABS]
    found = [_generator(row, runs) for row in rows[:_MOST]]
    return Found(tuple(runs[:_MOST]), tuple(found))


def _generator(row: Sequence[str], runs: Sequence[str]) -> Generator:
    """One line of the guest's (images/files/generators)."""
    kind, program, unit, source, hook, processes = (shown(word, _WORD) for word in row)
    unit = "" if unit == "-" else unit
    ready = hook if hook in ready_hooks() else ""
    names = {program, unit, unit.removesuffix(_UNIT)} - {""}
    hooks = {ready, *(f"restart:{name}" for name in names)}
    covers = (each for each in runs if each in hooks or _signals(each, program))
    return Generator(
        program=program,
        unit=unit,
        source=source,
        secrets=kind == "secrets",
        processes=decimal(processes, "a number of processes in the guest", most=1 << 22),
        hook=ready,
        covered=_KEYS if hook == "keys" else next(covers, ""),
    )


def _signals(hook: str, program: str) -> bool:
    """Whether a hook is a signal to that program."""
    name = hook.rpartition(":")[2]
    return hook.startswith("signal:") and (
        name == program or (name.endswith("*") and program.startswith(name[:-1]))
    )


async def _choose(
    folder: Path, wanted: Sequence[str], found: Found, progress: Callable[[str], None]
) -> None:
    """Have the clones of a guest run these hooks, in that order."""
    ready = sorted({each.hook for each in found.generators if each.hook})
    words: list[str] = []
    for hook in wanted:
        words += [f"{AUTO}:{each}" for each in ready] if hook == AUTO else [hook]
    words = [each for each in dict.fromkeys(words) if each != NONE]
    done = await _clone(folder, "choose", *words)
    if done.exit_code:
        raise InvalidInput(
            f"a clone hook cannot be: {said(done)}",
            hint="leave it out, or let --clone-hook command:CMD do what the clones need",
        )
    for line in done.text.splitlines()[:_MOST]:
        if line.startswith("left "):
            progress(f"left out: the clone hook {shown(line[5:])}")


async def _clone(folder: Path, *words: str) -> Completed:
    # The image's own shell may be any.
    argv = [f"{TOOLS_MOUNTPOINT}/bin/busybox", "sh", f"{TOOLS_MOUNTPOINT}/clone", *words]
    return await run_captured(folder, argv, timeout=_TIMEOUT)
