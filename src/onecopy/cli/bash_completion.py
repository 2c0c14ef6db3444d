"""Completion for bash: its script, and the words that it sends.

Not here: the names to complete (completion.py).
"""

from __future__ import annotations

import os
import shlex
from typing import ClassVar

from click.shell_completion import BashComplete, CompletionItem, add_completion_class


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
