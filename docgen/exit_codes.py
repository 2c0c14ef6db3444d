"""The page of exit codes, from the error tree."""

from __future__ import annotations

from docgen.command_pages import cell
from onecopy.errors import OnecopyError

_FOOT = """
- `onecopy exec` exits with the code of the program in the guest. 127 means that the guest has no
  program of that name. 128 + n means that signal n ended the program. 124 means that the program
  took longer than `--timeout`. If onecopy itself fails, it exits with 125.
- `onecopy run SYSTEM CMD` exits with the code of CMD.
- A command whose output nobody reads any more (`onecopy ls | head -1`) prints no error and exits
  with 141, which is 128 + SIGPIPE.
- Ctrl-C and SIGTERM give 130, after the command has undone what it began.
- `onecopy doctor` exits with 1 if something is missing.

The ids stand in JSON (`onecopy run --json`, "failures"). In Python each id is a class of
[`onecopy.errors`](python.md#errors).
"""


def classes() -> list[type[OnecopyError]]:
    """Return the classes of the error tree, by exit code."""
    return sorted(OnecopyError.__subclasses__(), key=lambda each: each.exit_code)


def rows() -> list[tuple[int, str, str]]:
    """Return exit code, id and meaning, by exit code."""
    found = [(0, "", "The command succeeded.")]
    found.append((1, OnecopyError.id, "A bug of onecopy, told in one line; see `--debug`."))
    return found + [
        (each.exit_code, each.id, (each.__doc__ or "").splitlines()[0].replace("``", "`"))
        for each in classes()
    ]


def page() -> str:
    """Return the page as Markdown."""
    lines = ["# Exit codes", "", "| Code | Id | Meaning |", "|---:|---|---|"]
    for code, id_, text in rows():
        lines.append(f"| {code} | {f'`{id_}`' if id_ else ''} | {cell(text)} |")
    return "\n".join(lines) + "\n" + _FOOT
