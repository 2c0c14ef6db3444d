"""What is left when commands and VMMs are killed: nothing, or nothing after the next command.

Proof is taken from outside: processes from /proc, files from the store and the run folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from onecopy.errors import InUse
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.model import Reference
from onecopy.store import Artifact
from tests.command import ONECOPY, onecopy, refused
from tests.vm.conftest import left, vmms

Clones = Callable[[int], list[GuestRecord]]


def test_rm_of_what_is_in_use_names_the_user(
    host: Runtime, saved: Artifact, clones: Clones
) -> None:
    (guest,) = clones(1)
    with pytest.raises(InUse) as caught:
        host.store.remove(Reference.parse(saved.ref))
    assert caught.value.users == (guest.name,)
    assert guest.name in refused(4, "rm", saved.ref)


def test_a_killed_vmm_leaves_nothing(host: Runtime, saved: Artifact, clones: Clones) -> None:
    before = left(host)
    (guest,) = clones(1)
    assert host.store.users(saved.digest) == [guest.name]
    os.kill(guest.pid, signal.SIGKILL)
    for _ in range(500):
        if not host.store.is_held(guest.name):
            break
        time.sleep(0.01)
    assert host.store.users(saved.digest) == []
    assert guest.name not in onecopy("ps").stdout
    # But for what it printed, and that it was killed.
    assert guest.name in onecopy("ps", "-a").stdout
    assert left(host) == {**before, "folders": sorted({*before["folders"], ".ended"})}
    onecopy("rm", guest.name)
    assert left(host) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_save_that_is_ended_leaves_nothing(
    host: Runtime, python_root: Artifact, number: signal.Signals
) -> None:
    before = left(host)
    argv = [ONECOPY, "save", "ended", "--root", python_root.ref, "--command", ""]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as command:
        assert command.stderr is not None
        for line in command.stderr:
            if "booting" in line:
                break
        while not vmms(host):
            time.sleep(0.01)
        time.sleep(1)
        command.send_signal(number)
        command.stderr.read()
    assert command.returncode == (-9 if number is signal.SIGKILL else 130)
    if number is signal.SIGKILL:
        onecopy("ps")  # the next command sweeps
    assert left(host) == before
    assert host.store.find(Reference("ended"), "system") is None


def test_qemu_killed_during_a_save_is_an_error_with_its_reason(
    host: Runtime, python_root: Artifact
) -> None:
    before = left(host)
    argv = [ONECOPY, "save", "shot", "--root", python_root.ref, "--command", ""]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as command:
        while not (running := vmms(host)):
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(running[0], signal.SIGKILL)
        _, said = command.communicate()
    assert command.returncode == 10, said
    assert "ended" in said
    assert left(host) == before


def test_one_that_cannot_start_takes_the_others_along(host: Runtime, saved: Artifact) -> None:
    before = left(host)
    onecopy("run", "--name", "taken-2", saved.ref)
    refused(5, "run", "-n", "3", "--name", "taken", saved.ref)
    assert [guest.name for guest in host.guests()] == ["taken-2"]
    refused(5, "run", "-n", "3", "--name", "taken", "--keep-going", saved.ref)
    assert {guest.name for guest in host.guests()} == {"taken-1", "taken-2", "taken-3"}
    onecopy("stop", "--all")
    assert left(host) == before
