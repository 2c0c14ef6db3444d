"""A guest that wants the host's terminal to obey it: by its console, its names and its failures."""

from __future__ import annotations

import asyncio
import os
import pty
import subprocess
import time

import pytest

from onecopy.guest.exec import run_captured
from onecopy.guest.runtime import Runtime
from onecopy.model import Reference
from onecopy.store import Artifact
from tests.command import ONECOPY
from tests.vm.conftest import Clones
from tests.vm.guests import Guests

#: For printf(1): a title, C1's CSI in UTF-8 and by itself, a turned text, a bell, no UTF-8.
HOSTILE = r"\033]0;owned\007\302\2332J\233\342\200\256x\377\033[31m"
SHOWN = r"\x1b]0;owned\x07\x9b2J\x9b\u202ex\xff\x1b[31m"


def onecopy(host: Runtime, *args: str, terminal: bool = False) -> tuple[int, bytes]:
    """Exit code, and both outputs; with ``terminal`` that is one, and what is drawn on it."""
    env = os.environ | {"ONECOPY_HOME": str(host.store.root), "TERM": "xterm"}
    argv = [ONECOPY, *args]
    if not terminal:
        done = subprocess.run(argv, env=env, capture_output=True, timeout=120, check=False)
        return done.returncode, done.stdout + done.stderr
    ours, theirs = pty.openpty()
    with subprocess.Popen(argv, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        drawn = b""
        try:
            while data := os.read(ours, 1 << 16):
                drawn += data
        except OSError:
            # The other side is closed.
            os.close(ours)
    return process.returncode, drawn


@pytest.mark.parametrize("terminal", [False, True])
def test_the_console(host: Runtime, clones: Clones, terminal: bool) -> None:
    (guest,) = clones(1)
    script = f"printf '{HOSTILE}\\nnext\\r\\n' >/dev/console"
    _run(host, guest.name, script)
    deadline = time.monotonic() + 60
    while b"next" not in (raw := onecopy(host, "logs", "--raw", guest.name)[1]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert b"\x1b]0;owned\x07" in raw and b"\xff" in raw
    code, text = onecopy(host, "logs", guest.name, terminal=terminal)
    assert code == 0
    assert SHOWN in text.decode()
    # A terminal's own lines end with it.
    assert not set("\x1b\x07\x9b\u202e") & set(text.decode())
    assert "next" in text.decode().splitlines()


def test_what_it_says_of_failures(host: Runtime, clones: Clones) -> None:
    (guest,) = clones(1)
    # Its busybox says that there is no such file.
    text = _refused(onecopy(host, "cp", f"{guest.name}:/none\x1b]0;owned\x07\u202ex", "/tmp"))
    assert r"\x1b]0;owned\x07\u202ex" in text
    # exec is the way to see it as it is.
    code, out = onecopy(host, "exec", guest.name, "--", "printf", HOSTILE)
    assert code == 0 and b"\x1b]0;owned\x07" in out


def test_a_hook_that_fails(host: Runtime, guests: Guests, saved: Artifact) -> None:
    (guest,) = guests.clone(saved)
    done = guest.save("hooked", clone_hooks=[f"command:printf '{HOSTILE}\\n' >&2; exit 3"])
    try:
        assert r"\x1b]0;owned\x07\x9b2J" in _refused(onecopy(host, "run", "hooked"))
        two = ("run", "-n", "2", "--keep-going", "hooked")
        assert _refused(onecopy(host, *two)).count(r"\x1b]0;owned\x07\x9b2J") == 2
    finally:
        host.store.remove(Reference.parse(done.artifact.ref))


def _refused(told: tuple[int, bytes]) -> str:
    code, output = told
    text = output.decode()
    assert code != 0 and text.startswith("onecopy: "), text
    assert not set("\x1b\x07\x9b\u202e\r") & set(text), text
    return text


def _run(host: Runtime, guest: str, script: str) -> None:
    done = asyncio.run(run_captured(host.run / guest, ["sh", "-c", script], timeout=60))
    assert done.exit_code == 0, done
