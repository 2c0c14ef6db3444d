"""KSM merges pages that clones wrote, and clones that write again get their own pages.

The machine's KSM settings are restored. Not here: measurements (benchmarks/merging.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecopy.errors import Incompatible
from onecopy.guest.observe import advise
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.linux.counters import ksm, smaps
from onecopy.model import MIB, PAGE_SIZE
from onecopy.store import Artifact
from tests.command import ONECOPY, answer, onecopy
from tests.conftest import cannot_run
from tests.vm.conftest import Clones, RunIn
from tests.vm.guests import Guests

PAGES = 1024
#: The same pages in each guest, and different from one another.
WRITE = "import hashlib\nwith open('/dev/shm/same', 'wb') as file:\n"
WRITE += f"    for n in range({PAGES}): file.write(hashlib.sha256(b'%d' % n).digest() * 128)\n"
CHECK = "cksum < /dev/shm/same"


def settings() -> dict[str, str | None]:
    names = ("run", "pages_to_scan", "sleep_millisecs", "smart_scan", "advisor_mode")
    return {name: ksm.setting(name) for name in names}


@pytest.fixture
def scanning() -> Iterator[None]:
    """KSM runs, fast, by our command; afterwards it is as it was, and nothing is merged."""
    before = settings()
    if before["run"] != "0" or os.geteuid():
        cannot_run("it needs root, and a kernel with KSM that is off")
    try:
        fast = ["--pages", "20000", "--sleep", "10"]
        onecopy("ksm", "on", *fast, *(["--no-smart"] if ksm.thorough() else []))
        yield
    finally:
        onecopy("ksm", "off", "--unmerge")
    assert settings() == before
    assert answer("ksm", "status", "--json")["saved"] == 0


def merging(pid: int) -> int:
    return int(Path(f"/proc/{pid}/ksm_merging_pages").read_text())


def test_equal_writes_of_clones_become_one(scanning: None, clones: Clones, run_in: RunIn) -> None:
    if not Path(f"/proc/{os.getpid()}/ksm_merging_pages").exists():
        cannot_run("this kernel does not tell what KSM merges of a process")
    guests = clones(2)
    for guest in guests:
        assert run_in(guest, "python3", "-c", WRITE).exit_code == 0
    deadline = time.monotonic() + 300
    while min(merging(guest.pid) for guest in guests) < PAGES:
        assert time.monotonic() < deadline, [merging(guest.pid) for guest in guests]
        time.sleep(0.5)
    told = answer("ksm", "status", "--json")
    merged = {each["name"]: each["merged"] for each in told["guests"]}
    assert min(merged[guest.name] for guest in guests) >= PAGES * PAGE_SIZE
    assert told["run"] == 1 and told["saved"] >= PAGES * PAGE_SIZE and told["cpu_seconds"] > 0
    assert told["changed"]["run"] == {"found": "0", "set": "1"}
    first, second = guests
    sums = [run_in(guest, "sh", "-c", CHECK).stdout for guest in guests]
    assert sums[0] == sums[1]
    # One writes on a merged page: the other does not see it.
    done = run_in(first, "sh", "-c", f"printf x | dd of=/dev/shm/same conv=notrunc; {CHECK}")
    assert done.stdout not in (b"", sums[0])
    assert run_in(second, "sh", "-c", CHECK).stdout == sums[1]


def test_a_running_guest_is_closed_to_it_and_opened(clones: Clones) -> None:
    guest, other = clones(2)
    assert offered(guest) and offered(other)
    onecopy("ksm", "deny", guest.name)
    assert not offered(guest) and offered(other)
    onecopy("ksm", "allow", guest.name, other.name)
    assert offered(guest) and offered(other)


def test_a_guest_may_start_closed_to_it(
    host: Runtime, saved: Artifact, busybox_root: Artifact
) -> None:
    onecopy("run", "--name", "closed", "--ksm", "none", saved.ref)
    guest = host.guest("closed").record()
    try:
        assert not offered(guest)
        onecopy("ksm", "allow", "closed")
        assert offered(guest)
    finally:
        host.end(guest)
    boot = ["boot", "--command", "sleep 9", "--dry-run"]
    assert "mem-merge" not in onecopy(*boot, busybox_root.ref).stdout
    assert "mem-merge=off" in onecopy(*boot, "--ksm", "none", busybox_root.ref).stdout


def offered(guest: GuestRecord) -> bool:
    """Whether QEMU offers the guest's RAM to KSM (proc_pid_smaps(5), VmFlags)."""
    found, ours = set(), False
    for line in Path(f"/proc/{guest.pid}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(str(guest.ram_path))
        elif ours and line.startswith("VmFlags:"):
            found.add("mg" in line.split())
    (only,) = found
    return only


def test_what_it_would_still_gain(host: Runtime, clones: Clones, run_in: RunIn) -> None:
    guests = clones(2)

    def gain() -> int:
        ways = advise.look(host, [guest.name for guest in guests]).survey.advice.ways
        return next(way.saves for way in ways if way.name == "ksm")

    before = gain()
    for guest in guests:
        assert run_in(guest, "python3", "-c", WRITE).exit_code == 0
    more = gain() - before
    # Beside these pages what the program has left in free memory, which is alike, too.
    assert 0.9 * PAGES * PAGE_SIZE <= more <= 32 * MIB
    # All guests of the host, others' too.
    told = answer("ksm", "status", "--gain", "--json")
    assert told["gain"] >= 0.9 * more


def test_it_runs_by_itself_and_is_put_back() -> None:
    before = settings()
    if before["run"] != "0" or os.geteuid():
        cannot_run("it needs root, and a kernel with KSM that is off")
    # Less than all of the memory is available on every host.
    argv = [ONECOPY, "ksm", "auto", "--interval", "0.1", "--threshold", "100"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as auto:
        try:
            assert auto.stdout
            assert "KSM runs" in auto.stdout.readline()
            assert ksm.setting("run") == "1"
            auto.send_signal(signal.SIGINT)
            assert auto.wait(60) == 130
        finally:
            auto.kill()
    assert settings() == before
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as auto:
        assert auto.stdout
        auto.stdout.readline()
        auto.kill()
    # After a crash it says what it had changed.
    assert answer("ksm", "status", "--json")["changed"]["run"]["found"] == "0"
    onecopy("ksm", "off", "--unmerge")
    assert settings() == before


@pytest.mark.usefixtures("scanning")
def test_a_vmms_own_memory_merges_if_asked(guests: Guests, saved: Artifact) -> None:
    try:
        apart, forked = (
            [guest.record.pid for guest in guests.clone(saved, 2, ksm="all", isolated_vmm=each)]
            for each in (True, False)
        )
    except Incompatible as error:
        cannot_run(error.message)
    # Relocated data alone is more, and equal only without address randomisation. VMMs of one fork
    # server have the same pages of it anyway (test_forked.py), but each has more of its own.
    deadline = time.monotonic() + 300
    while min(relocated := [merged(pid, "qemu-system") for pid in apart]) < MIB or not all(
        heaps := [merged(pid, "[heap]") for pid in forked]
    ):
        assert time.monotonic() < deadline, (relocated, heaps)
        time.sleep(0.5)


def merged(pid: int, path: str) -> int:
    """Merged bytes of QEMU's heap, or of its own file, which only relocation writes to."""
    mappings = [m for m in smaps.read(pid) if path in m.path]
    assert mappings
    if any(mapping.ksm is None for mapping in mappings):
        cannot_run("this kernel does not tell what is merged of a mapping")
    return sum(mapping.ksm or 0 for mapping in mappings)
