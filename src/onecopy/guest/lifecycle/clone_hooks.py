"""Clone hooks: programs that clones run before they are handed out, to reseed random generators.

A random generator outside the guest's kernel is part of the saved state: all clones draw the same
values from it, request after request. `save` finds the programs that hold one (images/files:
generators), and clone hooks (clone, hooks/) reseed them. This file bounds the guest's report of its
programs. Not here: what each clone does without hooks (guest/identity.py).
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
from onecopy.images.skipped import SKIPPED
from onecopy.images.tools import ready_hooks
from onecopy.vmm.guest_reply import decimal, shown

#: Selects the ready hooks of all programs that were found.
AUTO = "auto"
#: Selects no hooks, and removes those of the guest's own saved system.
NONE = "none"
#: Begins a hook that is a shell command.
COMMAND = "command:"
#: Each clone gets host keys of its own. OpenSSH's server then restarts itself (renew).
_KEYS = "SSH host keys"
_UNIT = ".service"
#: The number of tabs in a line about a generator.
_TABS = 5
#: The most entries of each kind in a guest's report, and the most characters of a word.
_MOST = 100
_WORD = 80
#: Seconds for the guest to answer.
_TIMEOUT = 120.0
_FORM = re.compile(r"[a-z][a-z-]*|restart:[\w@:.\\-]+|signal:[A-Z0-9+]+:[\w@.+*-]+", re.ASCII)


class Found(msgspec.Struct, frozen=True):
    """A guest's report.

    Attributes:
        runs: The hooks that its clones run, in that order.
        generators: The random generators in its programs.
    """

    runs: tuple[str, ...] = ()
    generators: tuple[Generator, ...] = ()


class Hooks(msgspec.Struct, frozen=True):
    """The clone hooks of a new saved system; None keeps those of the guest's own saved system.

    Attributes:
        names: The hooks by name, in order.
        command: The shell command that each clone runs after them; empty for none.
    """

    names: tuple[str, ...] | None = None
    command: str | None = None


#: Keeps all hooks of the guest's own saved system.
KEPT = Hooks()


def parse_hooks(texts: Iterable[str] | None) -> Hooks:
    """Parse clone hooks; None keeps those of the guest's own saved system.

    A command alone keeps the other hooks; other hooks, or an empty list, keep the command.

    Raises:
        InvalidInput: A text is no clone hook, or two are commands.
    """
    if texts is None:
        return KEPT
    hooks = [check_hook(each) for each in texts]
    commands = [each.removeprefix(COMMAND) for each in hooks if each.startswith(COMMAND)]
    names = tuple(each for each in hooks if not each.startswith(COMMAND))
    if len(commands) > 1:
        raise InvalidInput(
            f"{len(commands)} clone hooks are commands; clones run only one",
            hint="join them: 'command:FIRST; SECOND'",
        )
    if NONE in names and not commands:
        commands = [""]
    return Hooks(None if commands and not names else names, commands[0] if commands else None)


def check_hook(text: str) -> str:
    """Return the text if it is a valid clone hook; raise InvalidInput."""
    if text.startswith(COMMAND):
        return text
    ready = ready_hooks()
    if not _FORM.fullmatch(text) or (":" not in text and text not in (AUTO, NONE, *ready)):
        raise InvalidInput(
            f"{shown(text)!r} is not a clone hook",
            hint=f"one of {', '.join(ready)}, {AUTO}, {NONE}, restart:UNIT, restart:PROGRAM, "
            f"signal:NAME:PROGRAM or {COMMAND}CMD",
        )
    return text


async def hooked(
    folder: Path, wanted: Sequence[str] | None, progress: Callable[[str], None]
) -> Found:
    """Choose a guest's clone hooks, and find the generators in its programs.

    Args:
        folder: The guest's run directory.
        wanted: The hooks; None keeps those that the guest has.
        progress: Called with a line for each hook that is left out.

    Raises:
        InvalidInput: The guest cannot have one of the hooks.
        AgentFailed, GuestFailed: The guest or its agent failed.
    """
    if wanted is not None:
        # Each search takes seconds under TCG.
        found = await _look(folder) if AUTO in wanted else Found()
        await _choose(folder, wanted, found, progress)
    return await _look(folder)


async def _look(folder: Path) -> Found:
    done = await _clone(folder, "look")
    if done.exit_code:
        raise GuestFailed(f"the guest could not list its programs: {said(done)}")
    return read(done.stdout)


def read(told: bytes) -> Found:
    """Parse a guest's report (images/files/clone, look); raise AgentFailed."""
    lines = told.decode(errors="replace").splitlines()
    runs = [shown(line[5:], _WORD) for line in lines if line.startswith("runs ")]
    rows = [line.split("\t") for line in lines if line.count("\t") == _TABS]
    found = [_generator(row, runs) for row in rows[:_MOST]]
    return Found(tuple(runs[:_MOST]), tuple(found))


def _generator(row: Sequence[str], runs: Sequence[str]) -> Generator:
    """Parse one line of the report (images/files/generators)."""
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
    """Whether a hook sends a signal to ``program``."""
    name = hook.rpartition(":")[2]
    return hook.startswith("signal:") and (
        name == program or (name.endswith("*") and program.startswith(name[:-1]))
    )


async def _choose(
    folder: Path, wanted: Sequence[str], found: Found, progress: Callable[[str], None]
) -> None:
    """Set the hooks that the clones of a guest run, in that order."""
    ready = sorted({each.hook for each in found.generators if each.hook})
    words: list[str] = []
    for hook in wanted:
        words += [f"{AUTO}:{each}" for each in ready] if hook == AUTO else [hook]
    words = [each for each in dict.fromkeys(words) if each != NONE]
    done = await _clone(folder, "choose", *words)
    if done.exit_code:
        raise InvalidInput(
            f"the guest refuses a clone hook: {said(done)}",
            hint="omit it, or reseed the program with --clone-hook command:CMD",
        )
    for line in done.text.splitlines()[:_MOST]:
        if line.startswith("left "):
            progress(f"{SKIPPED}the clone hook {shown(line[5:])}")


async def _clone(folder: Path, *words: str) -> Completed:
    # The image may have any shell, or none.
    argv = [f"{TOOLS_MOUNTPOINT}/bin/busybox", "sh", f"{TOOLS_MOUNTPOINT}/clone", *words]
    return await run_captured(folder, argv, timeout=_TIMEOUT)
