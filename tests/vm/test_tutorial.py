"""docs/tutorial.md: each block runs as it stands. The programs of the guides run, too."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecopy.guest.runtime import Runtime
from onecopy.model import Reference
from onecopy.store import Artifact
from tests.conftest import cannot_run
from tests.console import follow, sessions
from tests.vm.guests import save_system
from tests.vm.kept import PROJECT, kept_store

TEXT = (PROJECT / "docs/tutorial.md").read_text()
#: The commands of the tests' own environment come first.
ENV = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    shutil.copytree(PROJECT / "examples", tmp_path / "examples")
    return tmp_path / "examples"


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Runtime]:
    """A store of the test's own, with a kernel and tools; its names are all free."""
    home = tmp_path / "home"
    with kept_store() as kept:
        kept.copy(home)
    mine = Runtime.open(home)
    yield mine
    mine.end(*mine.guests())
    shutil.rmtree(mine.run)


def test_each_block(fresh: Runtime, examples: Path) -> None:
    if os.geteuid():
        cannot_run("only root can build a root from Debian packages")
    found = sessions(TEXT)
    assert len(found) >= 10
    env = ENV | {"ONECOPY_HOME": str(fresh.store.root)}
    said = "".join(follow(session, examples, env) for session in found)
    # Guests have said so themselves.
    for told in ("web-3\n", "changed\n", "the first line\nmore\n", "kept\n", "tests passed\n"):
        assert told in said
    assert fresh.guests() == []


def test_the_sandbox(host: Runtime, python_root: Artifact, examples: Path) -> None:
    save_system("sandbox", python_root, command="sleep infinity", network=False, memory="256M")
    argv = [sys.executable, "sandbox.py"]
    code = (
        "import os, socket\n"
        "print(socket.gethostname(), os.listdir('/sys/class/net'), flush=True)\n"
        "os._exit(3)"
    )
    done = subprocess.run(argv, input=code, cwd=examples, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert re.fullmatch(r"sandbox-\w+ \['lo'\]\n", done.stdout), done.stdout
    host.store.remove(Reference("sandbox"))
