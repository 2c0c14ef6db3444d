"""The command as a user types it: a process of its own, and all that it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

#: The installed command, for tests that start it by themselves.
ONECOPY = str(Path(sys.executable).with_name("onecopy"))
#: Seconds after which a command that must not block has blocked.
STUCK = 300.0

Done = subprocess.CompletedProcess[str]


def onecopy(
    *args: str | Path, code: int | None = 0, home: Path | None = None, timeout: float = STUCK
) -> Done:
    """Run ``onecopy ARGS`` to its end, and return what it printed.

    It must exit with ``code`` (None: any), and never with a traceback. It works in the store
    ``home`` (default: the test session's).
    """
    env = os.environ | ({"ONECOPY_HOME": str(home)} if home else {})
    argv = [ONECOPY, *map(str, args)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, env=env)
    told = f"{args}: {done.returncode} {done.stdout} {done.stderr}"
    assert code is None or done.returncode == code, told
    assert "Traceback" not in done.stderr, told
    return done


def answer(*args: str | Path, code: int = 0, home: Path | None = None) -> Any:
    """Run a command that prints JSON, and return the values."""
    return json.loads(onecopy(*args, code=code, home=home).stdout)


def refused(code: int, *args: str | Path, home: Path | None = None) -> str:
    """Run a command that must fail with ``code``; return what it prints on standard error."""
    return onecopy(*args, code=code, home=home).stderr
