"""Completions for shells: names of guests, references, and paths after a prefix such as dir:.

No function here raises: no completion is better than an error in the middle of a line. Not here:
the completions of each argument (params.py), the script for bash (bash_completion.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from onecopy.errors import OnecopyError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: The most names to offer.
_MOST = 1000


def offered(find: Callable[[], Iterable[str]], incomplete: str) -> list[CompletionItem]:
    """Return the names of ``find`` that begin with the typed text."""
    from click.shell_completion import CompletionItem  # only a shell asks

    with contextlib.suppress(OnecopyError, OSError):
        found = sorted({name for name in find() if name.startswith(incomplete)})
        return [CompletionItem(name) for name in found[:_MOST]]
    return []


def files(incomplete: str) -> list[CompletionItem]:
    """Let the shell complete the name of a file."""
    from click.shell_completion import CompletionItem  # only a shell asks

    return [CompletionItem(incomplete, type="file")]


def guests(*, ended: bool = False) -> list[str]:
    """Return the names of running guests, and with ``ended`` of known ended ones."""
    from onecopy.guest.runtime import Runtime

    host = Runtime.open()
    return [guest.name for guest in host.guests() + (host.ended() if ended else [])]


def references(kind: str | None = None) -> list[str]:
    """Return the references NAME:VERSION in the store, with ``kind`` only of that kind."""
    from onecopy.store import Store

    return [artifact.ref for artifact in Store().artifacts(kind)]


def names() -> list[str]:
    """Return the names in the store, without versions."""
    from onecopy.store import Store

    return [artifact.name for artifact in Store().artifacts()]


def segments_of(guest: str | None) -> list[str]:
    """Return the names of the segments that a guest has loaded."""
    from onecopy.guest.runtime import Runtime

    found = [each for each in Runtime.open().guests() if each.name == guest]
    return [item.name for each in found for item in each.attached if item.state == "loaded"]


def paths(prefix: str, typed: str) -> list[str]:
    """Complete a path after ``prefix``, as in dir:PATH; directories end with /."""
    folder, _, start = typed.rpartition("/")
    above = f"{folder}/" if "/" in typed else ""
    with os.scandir(Path(above or ".").expanduser()) as entries:
        return [
            f"{prefix}{above}{entry.name}{'/' if entry.is_dir() else ''}"
            for entry in entries
            if entry.name.startswith(start) and (start or not entry.name.startswith("."))
        ]
