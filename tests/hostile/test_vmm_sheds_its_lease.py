"""A VMM that lets go of all that it was known by, and users who remove what is under it.

It is a real QEMU, made to do so by a debugger's means (inject.c). It stays known: shown, ended on
demand, its name taken and its blobs held.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from onecopy.errors import AlreadyExists, InUse
from onecopy.guest import lost_vmms
from onecopy.guest.lifecycle.start import start_one
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.linux import vmm_registry
from onecopy.model import Reference
from onecopy.store import Artifact
from tests.command import ONECOPY, STUCK, answer, onecopy
from tests.conftest import cannot_run
from tests.vm.conftest import Boot
from tests.vm.guests import boot_plan
from tests.vm.kept import MEMTEST

_CLOSE, _FLOCK = 3, 73
_LOCK_UN = 8

Inject = Callable[..., int]


@pytest.fixture(scope="module")
def inject(tmp_path_factory: pytest.TempPathFactory) -> Inject:
    """``inject(pid, number, *arguments)`` has a process make a system call."""
    if shutil.which("gcc") is None:
        cannot_run("there is no gcc")
    program = tmp_path_factory.mktemp("inject") / "inject"
    source = Path(__file__).with_name("inject.c")
    subprocess.run(["gcc", "-Os", "-o", program, source], check=True)

    def run(pid: int, *words: int | str) -> int:
        argv = [str(program), str(pid), *map(str, words)]
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
        return int(done.stdout or 0)

    return run


@pytest.fixture
def memtest(host: Runtime) -> Artifact:
    """A bare machine: it is up at once."""
    return host.store.resolve(MEMTEST)


@pytest.fixture
def guest(memtest: Artifact, boot: Boot) -> Iterator[GuestRecord]:
    record = boot(memtest)
    yield record
    vmm_registry.end([record.process])


def shown(name: str, home: Path | None = None) -> dict[str, object] | None:
    """What `ps` says of a guest."""
    guests = answer("ps", "--json", home=home)
    return next((each for each in guests if each["name"] == name), None)


def leases(pid: int) -> list[int]:
    """The descriptors of a process that are of leases."""
    found = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # QEMU closes files meanwhile
            if "/leases/" in str(each.readlink()):
                found.append(int(each.name))
    return found


def shed(inject: Inject, pid: int) -> None:
    """Let a QEMU drop its lease, leave its folder and write over its command line."""
    for fd in leases(pid):
        assert inject(pid, _FLOCK, fd, _LOCK_UN) == 0
        assert inject(pid, _CLOSE, fd) == 0
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    # Field 48: where its arguments begin (proc_pid_stat(5)).
    inject(pid, "write", stat[45], "sleep" + 400 * "x")
    assert b"guest=" not in Path(f"/proc/{pid}/cmdline").read_bytes()


def check_known(host: Runtime, memtest: Artifact, guest: GuestRecord) -> dict[str, object]:
    """It is shown, its name is taken, what it runs from is held."""
    found = shown(guest.name)
    assert found and found["pid"] == guest.pid and found["note"]
    prepared = boot_plan(host, memtest.ref)
    with pytest.raises(AlreadyExists):
        asyncio.run(start_one(host, prepared, guest.name))
    assert vmm_registry.Process(guest.pid, guest.start_ticks).lives()
    return found


def check_ended(host: Runtime, guest: GuestRecord, *args: str, home: Path | None = None) -> None:
    done = onecopy("stop", *args, home=home)
    assert f"{guest.name} was ended" in done.stdout
    assert not guest.process.lives()
    assert shown(guest.name, home) is None
    assert not (host.run / guest.name).exists()
    assert not [each for each in vmm_registry.entries() if each.holder == guest.name]


def test_one_that_lets_go_of_its_lease(
    host: Runtime, memtest: Artifact, guest: GuestRecord, inject: Inject
) -> None:
    shed(inject, guest.pid)
    host.store.collect()
    assert not host.store.is_locked(guest.name)
    assert host.store.is_held(guest.name)
    assert host.store.users(memtest.digest) == [guest.name]
    with pytest.raises(InUse):
        host.store.remove(Reference.parse(memtest.ref))
    found = check_known(host, memtest, guest)
    assert found["kind"] == "booted" and "lease" in str(found["note"])
    check_ended(host, guest, guest.name)
    assert host.store.users(memtest.digest) == []
    assert list((host.store.root / "leases").iterdir()) == []


@pytest.mark.parametrize("shedding", [False, True])
def test_its_run_folder_is_removed(
    host: Runtime, memtest: Artifact, guest: GuestRecord, inject: Inject, shedding: bool
) -> None:
    if shedding:
        shed(inject, guest.pid)
    shutil.rmtree(host.run / guest.name)
    host.sweep()
    found = check_known(host, memtest, guest)
    assert found["kind"] == "lost" and "run directory" in str(found["note"])
    assert host.store.users(memtest.digest) == [guest.name]
    # What `stop --all` takes.
    assert guest.process in [each.process for each in lost_vmms.shown(host)]
    check_ended(host, guest, guest.name)


@pytest.mark.parametrize("shedding", [False, True])
def test_nothing_is_left_of_it_but_its_user(
    host: Runtime, memtest: Artifact, inject: Inject, shedding: bool
) -> None:
    """As after all of /run/onecopy was removed; nobody but guests has such a user number."""
    onecopy("boot", "--name", "stray", memtest.ref)
    guest = host.guest("stray").record()
    if shedding:
        shed(inject, guest.pid)
    for entry in vmm_registry.of_store(host.run.name):
        entry.forget()
    shutil.rmtree(host.run / guest.name)
    (found,) = [each for each in lost_vmms.lost(host) if each.pid == guest.pid]
    assert found.name == (
        f"uid-{Path('/proc', str(guest.pid)).stat().st_uid}" if shedding else guest.name
    )
    check_ended(host, replace(guest, name=found.name), found.name)


def test_its_record_is_removed(host: Runtime, memtest: Artifact, guest: GuestRecord) -> None:
    (host.run / guest.name / "guest.json").unlink()
    assert "record" in str(check_known(host, memtest, guest)["note"])
    check_ended(host, guest, guest.name)


@pytest.mark.parametrize("chroot", [False, True])
def test_elsewhere_it_is_nobody_s_stray(guest: GuestRecord, tmp_path: Path, chroot: bool) -> None:
    """Where /run is another one, in a chroot as well, onecopy neither shows nor ends the guest."""
    root = tmp_path / "root"
    root.mkdir()
    enter = f"mount --rbind / {root} && mount -t tmpfs run {root}/run && chroot {root}"
    if not chroot:
        enter = "mount -t tmpfs run /run && env"
    command = f"ONECOPY_HOME={tmp_path}/home {ONECOPY}"
    script = f"{enter} sh -c '{command} ps --json && {command} stop --all'"
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=STUCK)
    assert done.returncode == 0, done
    assert guest.name not in done.stdout + done.stderr
    assert guest.process.lives()


def test_all_run_folders_are_removed(host: Runtime, guest: GuestRecord) -> None:
    shutil.rmtree(host.run)
    found = shown(guest.name)
    assert found and found["pid"] == guest.pid and found["kind"] == "lost"
    check_ended(host, guest, guest.name)


def test_its_store_is_removed(
    host: Runtime, memtest: Artifact, tmp_path: Path, inject: Inject
) -> None:
    """Any other store of the user shows and ends it, and its run folders go then."""
    root = tmp_path / "store"
    subprocess.run(["cp", "-a", "--reflink=auto", host.store.root, root], check=True)
    other = Runtime.open(root)
    prepared = boot_plan(other, memtest.ref)
    guest = asyncio.run(start_one(other, prepared, "orphan"))
    try:
        shutil.rmtree(root)
        shed(inject, guest.pid)
        found = shown("orphan")
        assert found and found["pid"] == guest.pid and str(root) in str(found["note"])
        assert other.run.exists()
        # It does not take a name from the guests of this store.
        with host.store.hold([memtest.digest], "orphan"):
            pass
        check_ended(other, guest, "orphan")
        Runtime.open(host.store.root)
        assert not other.run.exists()
    finally:
        vmm_registry.end([guest.process])


def test_a_guest_s_number_is_not_given_out_again(host: Runtime, guest: GuestRecord) -> None:
    """As long as its VMM or a file of it is there."""
    uid = Path(f"/proc/{guest.pid}").stat().st_uid
    assert uid in vmm_registry.users()
    vmm_registry.end([guest.process])
    assert uid in vmm_registry.users()
    host.end(guest)
    assert uid not in vmm_registry.users()


def test_another_process_with_its_number_is_not_ended(host: Runtime, guest: GuestRecord) -> None:
    """Numbers of processes come again: one that began at another time is somebody else's."""
    other = subprocess.Popen(["sleep", "60"])
    try:
        began = int(Path(f"/proc/{other.pid}/stat").read_text().split()[21])
        vmm_registry.register(host.run / "early", vmm_registry.Process(other.pid, began - 1), 0)
        assert shown("early") is None
        assert not host.store.is_held("early")
        assert not [each for each in vmm_registry.entries() if each.holder == "early"]
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_stopped_qemu_holds_up_no_other_command(
    host: Runtime, guest: GuestRecord, boot: Boot, memtest: Artifact
) -> None:
    """One that stands still for a killed command, and answers nobody."""
    second = boot(memtest)
    (host.run / guest.name / "paused").touch()
    os.kill(guest.pid, 19)
    try:
        times = []
        for _ in range(4):
            began = time.monotonic()
            assert shown(second.name)
            times.append(time.monotonic() - began)
        (host.run / guest.name / "paused").unlink()
        began = time.monotonic()
        assert shown(second.name)
        plain = time.monotonic() - began
        # The first may ask it for a moment; the others do not ask again.
        assert times[0] < plain + 2
        assert min(times[1:]) < 2 * plain + 0.5
        began = time.monotonic()
        onecopy("stop", second.name)
        assert time.monotonic() - began < 2 * plain + 2
    finally:
        os.kill(guest.pid, 18)
