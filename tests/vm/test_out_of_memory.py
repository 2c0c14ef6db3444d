"""A control group runs out of memory while many guests start in it.

Not here: refusals on a host with too little memory (test_lifecycle.py).

Source: Linux Documentation/admin-guide/cgroup-v1/memory.rst, cgroup-v2.rst.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecopy.errors import OnecopyError
from onecopy.guest.end import Cause
from onecopy.guest.lifecycle.stop import wait_for_end
from onecopy.guest.runtime import Runtime
from onecopy.linux import kmsg, vmm_registry
from onecopy.model import MIB
from onecopy.store import Artifact
from onecopy.vmm import fork_registry
from tests.command import ONECOPY, onecopy
from tests.conftest import cannot_run
from tests.vm.conftest import Clones, RunIn, vmms

#: Bytes for a command and what it starts: for some clones, but for 40 by far not.
LIMIT = 256 * MIB


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Path]:
    """The folder of a control group that has LIMIT bytes; it goes at the end."""
    version1 = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    if version1.exists():
        yield from _group(version1.parent, "memory.limit_in_bytes")
        return
    # Wherever the host has it, and also where it has it nowhere.
    root = tmp_path / "cgroup"
    root.mkdir()
    subprocess.run(["mount", "-t", "cgroup2", "none", root], check=True)
    try:
        if "memory" not in (root / "cgroup.controllers").read_text():
            cannot_run("this kernel cannot limit the memory of a control group")
        (root / "cgroup.subtree_control").write_text("+memory")
        yield from _group(root, "memory.max")
    finally:
        subprocess.run(["umount", root], check=True)


def _group(root: Path, limit: str) -> Iterator[Path]:
    made = root / f"onecopy-test-{os.getpid()}"
    made.mkdir()
    try:
        (made / limit).write_text(str(LIMIT))
        yield made
    finally:
        # Fork servers stay there until they have been idle for a while.
        members = (made / "cgroup.procs").read_text().split()
        servers = [each.process for each in fork_registry.running()]
        vmm_registry.end(each for each in servers if str(each.pid) in members)
        made.rmdir()


def _killed(group: Path) -> int:
    """How many processes of the group the kernel has killed for its memory."""
    events = group / "memory.events"
    text = (events if events.exists() else group / "memory.oom_control").read_text()
    found = re.search(r"^oom_kill (\d+)$", text, re.M)
    assert found, text
    return int(found[1])


def test_in_the_middle_of_many(
    host: Runtime, saved: Artifact, clones: Clones, run_in: RunIn, group: Path
) -> None:
    (other,) = clones(1)
    before, known = vmms(host), host.ended()
    script = f"echo $$ >{group}/cgroup.procs; exec {ONECOPY} run -n 40 --overcommit {saved.name}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=300)
    assert _killed(group)
    # It may have been a VMM or the command itself that the kernel chose.
    said = (done.returncode, "out of memory" in done.stderr)
    assert said in ((10, True), (-9, False), (137, False)), done
    onecopy("ps")
    assert vmms(host) == before
    assert [guest.name for guest in host.guests()] == [other.name]
    # None of them was handed out.
    assert host.ended() == known
    assert run_in(other, "hostname").stdout.decode().strip() == other.name
    assert not any((host.store.root / "tmp").iterdir())


def test_a_guest_s_qemu(host: Runtime, clones: Clones, run_in: RunIn, group: Path) -> None:
    """It is told apart from one that somebody has killed."""
    guest, killed = clones(2)
    limit = next(
        each for each in ("memory.max", "memory.limit_in_bytes") if (group / each).exists()
    )
    (group / limit).write_text(str(16 * MIB))
    (group / "cgroup.procs").write_text(str(guest.pid))
    with pytest.raises(OnecopyError):
        # What it has already is the old group's.
        run_in(guest, "python3", "-c", "bytes(b'x') * (96 << 20)")
    assert _killed(group)
    os.kill(killed.pid, signal.SIGKILL)
    assert asyncio.run(wait_for_end(guest, 60)) and asyncio.run(wait_for_end(killed, 60))
    host.sweep()
    mine = (guest.name, killed.name)
    causes = {
        each.name: each.ended.cause for each in host.ended() if each.ended and each.name in mine
    }
    if not kmsg.deaths():
        cannot_run("this user may not read the kernel's log")
    assert causes == {guest.name: Cause.HOST_OUT_OF_MEMORY, killed.name: Cause.KILLED}
    told = onecopy("ps", "-a").stdout
    assert "the host's kernel killed QEMU: out of memory in its control group" in told
