"""plan measures real clones, ends them, and keeps what it found."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from onecopy.guest import planning
from onecopy.guest.host import Host
from onecopy.model import MIB
from onecopy.store import Artifact

ONECOPY = str(Path(sys.executable).with_name("onecopy"))


def plan(*args: str) -> dict[str, Any]:
    argv = [ONECOPY, "plan", "--json", *args]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=300)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_few_clones_are_measured(host: Host, saved: Artifact) -> None:
    before = {guest.name for guest in host.guests()}
    assert planning.kept(host, saved) is None
    profile = asyncio.run(planning.measure(host, saved, planning.Size(1, 3, 1.0)))
    assert {guest.name for guest in host.guests()} == before
    assert profile.digest == saved.digest and profile.clones == 4
    assert profile.shared > 8 * MIB and profile.each > MIB and profile.start_cpu > 0
    planning.keep(host, saved, profile)
    assert planning.kept(host, saved) == profile
    # The command takes what is known.
    found = plan("--system", saved.ref, "--guests", "100", "--memory", "2G")
    assert found["profile"]["digest"] == saved.digest and found["profile"]["clones"] == 4
    assert found["memory"] == profile.shared + found["per_host"] * profile.each
    assert found["fits"]
