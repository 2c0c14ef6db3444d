"""Completions for shells: names of guests, references, and paths after a prefix such as dir:.

No function here raises: no completion is better than an error in the middle of a line. Not here:
the completions of each argument (params.py).
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

from click.shell_completion import BashComplete, CompletionItem, add_completion_class

from onecopy.errors import OnecopyError

#: The most names to offer.
_MOST = 1000


def offered(find: Callable[[], Iterable[str]], incomplete: str) -> list[CompletionItem]:
    """Return the names of ``find`` that begin with the typed text."""
    with contextlib.suppress(OnecopyError, OSError):
        found = sorted({name for name in find() if name.startswith(incomplete)})
        return [CompletionItem(name) for name in found[:_MOST]]
    return []


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


class Bash(BashComplete):
    """Completion for bash, where a colon ends a word but not an argument of onecopy.

    bash splits the typed text at colons (COMP_WORDBREAKS), and replaces only the text after the
    last one. So this class reads the whole line, and returns that part of each completion.
    """

    source_template: ClassVar[str] = """\
%(complete_func)s() {
    local IFS=$'\\n' completion type value
    COMPREPLY=()
    for completion in $(COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \\
        COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD %(complete_var)s=bash_complete "$1")
    do
        IFS=',' read -r type value <<< "$completion"
        if [[ $type == dir ]]; then
            compopt -o dirnames
        elif [[ $type == file ]]; then
            compopt -o default
        elif [[ $type == plain ]]; then
            COMPREPLY+=("$value")
            [[ $value == *[:/] ]] && compopt -o nospace
        fi
    done
    return 0
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the typed word, and the typed word."""
        words = _words(os.environ.get("COMP_LINE", os.environ.get("COMP_WORDS", "")))
        return words[1:-1], words[-1]

    def format_completion(self, item: CompletionItem) -> str:
        """Return the text that bash puts after the last colon of the word."""
        _, incomplete = self.get_completion_args()
        kept = 0
        if ":" in os.environ.get("COMP_WORDBREAKS", ":"):
            kept = incomplete.rfind(":") + 1
        return f"{item.type},{str(item.value)[kept:]}"


def register() -> None:
    """Make click use `Bash` for its script and for requests of that script."""
    add_completion_class(Bash)


def _words(line: str) -> list[str]:
    """Split a line that may be incomplete; the last word is the typed one, or empty."""
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    try:
        words.extend(lexer)
    except ValueError:
        # The line ends inside quotes.
        words.append(lexer.token)
        return words
    return [*words, ""] if not words or line[-1:].isspace() else words
