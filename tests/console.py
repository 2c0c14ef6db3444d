"""Sessions in the docs: what is typed after ``$``, and what comes back.

A block of ```` ```console ```` is run as a user types it. Its output must be what the page shows,
but for sizes, times and digests, and for what ``[...]`` stands for.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: What differs from run to run: sizes and times, then digests.
_DIFFERS = (
    (re.compile(r"\d+(?:\.\d+)? (s|KiB|MiB|GiB)\b"), r"# \1"),
    (re.compile(r"sha256:[0-9a-f]+"), "sha256:#"),
)


@dataclass(frozen=True)
class Step:
    """One command of a session, and the output that the page shows."""

    command: str
    output: str


def sessions(text: str) -> list[list[Step]]:
    """Return the steps of each console block of a page."""
    return [list(_steps(block)) for block in _BLOCK.findall(text)]


def _steps(block: str) -> Iterator[Step]:
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        lines = part.splitlines(keepends=True)
        typed = 1
        while lines[typed - 1].endswith("\\\n"):
            typed += 1
        yield Step("".join(lines[:typed]).strip(), "".join(lines[typed:]))


def follow(session: list[Step], directory: Path, env: dict[str, str], *, only: bool = False) -> str:
    """Run a session in ``directory``; return what all of it prints on standard output.

    ``env`` comes to this process' environment, or with ``only`` takes its place. Progress and
    warnings, on standard error, are not compared.

    Raises AssertionError if a command fails, or prints what the page does not show.
    """
    said = ""
    for step in session:
        done = subprocess.run(
            ["bash", "-c", step.command],
            cwd=directory,
            env=env if only else os.environ | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        told = f"$ {step.command}\n{done.stdout}{done.stderr}(exit code {done.returncode})"
        assert done.returncode == 0, told
        assert shows(step.output, done.stdout), f"the page shows:\n{step.output}\nbut:\n{told}"
        said += done.stdout
    return said


def shows(page: str, output: str) -> bool:
    """Whether ``output`` is what a page shows. A line ``[...]`` stands for any lines, or none."""
    pattern = ""
    for part in re.split(r"(^\[\.\.\.\]\n|\[\.\.\.\])", page, flags=re.MULTILINE):
        pattern += {"[...]\n": r"(?:.*\n)?", "[...]": ".*"}.get(part, re.escape(_plain(part)))
    return re.fullmatch(pattern, _plain(output), re.DOTALL) is not None


def _plain(text: str) -> str:
    for pattern, written in _DIFFERS:
        text = pattern.sub(written, text)
    return re.sub(r"[ \t]+", " ", re.sub(r"\n+", "\n", text))
