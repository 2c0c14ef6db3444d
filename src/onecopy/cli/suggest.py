"""Suggestions for wrong names of commands, guests and references.

Not here: options (click suggests those), and references that the store looks up (store/names.py
suggests those).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onecopy.errors import InvalidInput, NotFound, OnecopyError, did_you_mean

#: Command of Docker, libvirt or others -> the equivalent in onecopy.
ELSEWHERE = {
    "clone": "run",
    "cmd": "exec",
    "container": "ps",
    "containers": "ps",
    "define": "build",
    "delete": "rm",
    "destroy": "stop --now",
    "df": "ls",
    "diff": "inspect",
    "domblklist": "disks",
    "down": "stop --all",
    "guests": "ps",
    "help": "--help",
    "history": "inspect",
    "image": "ls",
    "images": "ls",
    "import": "build",
    "info": "doctor",
    "kill": "stop --now",
    "list": "ps",
    "load": "attach",
    "log": "logs",
    "log-in": "console",
    "mount": "attach",
    "new": "create",
    "port": "ps",
    "prune": "rm",
    "pull": "build",
    "remove": "rm",
    "rmi": "rm",
    "scp": "cp",
    "sh": "exec",
    "shell": "exec",
    "show": "inspect",
    "shutdown": "stop",
    "snapshot": "save",
    "ssh": "exec",
    "start": "run",
    "stats": "top",
    "system": "doctor",
    "undefine": "rm",
    "unload": "detach",
    "unmount": "detach",
    "up": "boot",
    "version": "--version",
    "volume": "disks",
    "volumes": "disks",
    "warm": "preload",
}
_MOST = 3
#: Kind of artifact -> the command that starts guests from it.
_STARTS = {"segment": "boot", "system": "run"}


def near(name: str, known: Iterable[str], like: float = 0.6) -> list[str]:
    """Return the known names that are most similar to a wrong one, the best first.

    Args:
        like: The least similarity, from 0 to 1.
    """
    import difflib  # most commands suggest nothing

    # difflib takes time quadratic in the length of a name.
    return difflib.get_close_matches(name[:64], list(known), n=_MOST, cutoff=like)


def no_command(name: str, path: str, known: Sequence[str]) -> InvalidInput:
    """Return the error for a command, or subcommand of ``path``, that does not exist."""
    elsewhere = ELSEWHERE.get(name) if path == "onecopy" else None
    found = [elsewhere] if elsewhere else near(name, known)
    question = did_you_mean(f"`{path} {each}`" for each in found)
    return InvalidInput(
        f"{path} has no command {name!r}",
        hint=f"{question}`{path} --help` lists the commands",
    )


def hint_of(error: OnecopyError) -> str:
    """Return the hint of an error.

    If a guest does not exist, the hint begins with the most similar names.
    """
    if not isinstance(error, NotFound) or not error.guest:
        return error.hint
    try:
        found = _instead_of(error.guest)
    except (OnecopyError, OSError):
        # The original error matters more than a suggestion.
        found = ""
    return f"{found}{error.hint}"


def _instead_of(name: str) -> str:
    from onecopy.guest.runtime import Runtime

    host = Runtime.open()
    found = near(name, [guest.name for guest in host.guests() + host.ended()])
    if found:
        return did_you_mean(found)
    for artifact in host.store.artifacts():
        if artifact.name == name and artifact.kind in _STARTS:
            start = f"`onecopy {_STARTS[artifact.kind]} {name}`"
            return f"{name} is a {artifact.kind}, and {start} starts guests from it; "
    return ""
