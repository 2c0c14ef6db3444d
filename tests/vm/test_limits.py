"""The limits of real VMMs on the host, and the release of their resources.

Not here: a rogue program in QEMU's place (test_confinement.py), logs without a guest
(tests/unit/vmm/test_logs.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from onecopy.errors import GuestFailed, StoreDamaged
from onecopy.guest.lifecycle import admission
from onecopy.guest.lifecycle.save import save_guest
from onecopy.guest.lifecycle.start import start_one
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.guest.segments.attach import attach
from onecopy.images.create import NewRange, create_segment
from onecopy.linux.counters import smaps
from onecopy.model import HUGE_PAGE_SIZE, MIB, PageClass, Reference
from onecopy.store import Artifact
from onecopy.vmm import log_room, logs, vmm_limits
from onecopy.vmm.argv import LEAST_TRANSLATED
from onecopy.vmm.logs import LOG_ROOM
from onecopy.vmm.monitor import Monitor, connect
from tests.vm.conftest import Clones, RunIn
from tests.vm.guests import Guests, boot_plan, clone_plan

DISK = 64 * MIB


def limits(guest: GuestRecord) -> dict[str, int]:
    """The soft limits as the kernel tells them; what is unlimited is left out."""
    text = Path(f"/proc/{guest.pid}/limits").read_text()
    found = re.findall(r"^Max (.+?)\s{2,}(\d+)", text, re.MULTILINE)
    return {name: int(value) for name, value in found}


def uses(guest: GuestRecord, name: str) -> int:
    """Bytes, or threads, as /proc/PID/status has them."""
    text = Path(f"/proc/{guest.pid}/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+)( kB)?", text, re.MULTILINE)
    assert found
    return int(found[1]) * (1024 if found[2] else 1)


@pytest.fixture
def fitted(guests: Guests, saved: Artifact, tmp_path: Path) -> GuestRecord:
    """A clone with a disk, whose QEMU has been told nothing of it before it ran."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"")
    os.truncate(disk, DISK)
    return guests.clone(saved, disks=[str(disk)])[0].record


def test_real_ones(host: Runtime, clones: Clones, fitted: GuestRecord, run_in: RunIn) -> None:
    """All are limited, none comes near its limits, and more comes with what they are given."""
    (plain,) = clones(1)
    for guest in (plain, fitted):
        has = limits(guest)
        assert (has["core file size"], has["locked memory"], has["msgqueue size"]) == (0, 0, 0)
        assert uses(guest, "VmData") * 1.1 < has["data size"] < guest.memory + 2500 * MIB
        assert uses(guest, "VmSize") * 1.1 < has["address space"]
        assert uses(guest, "Threads") * 2 < has["processes"] < 200
        assert len(list(Path(f"/proc/{guest.pid}/fd").iterdir())) * 4 < has["open files"] <= 4096
    assert limits(plain)["file size"] == LOG_ROOM
    assert limits(fitted)["file size"] == DISK + LOG_ROOM
    # To its last byte.
    write = f"dd if=/dev/zero of=/dev/onecopy/disk0 bs=1M count={DISK // MIB} conv=fsync"
    done = run_in(fitted, "sh", "-c", write)
    assert done.exit_code == 0, done.stderr
    ranges = [NewRange(each, HUGE_PAGE_SIZE) for each in (PageClass.SW, PageClass.EW)]
    create_segment(host.store, Reference("limits"), ranges)
    before = limits(plain)
    asyncio.run(attach(host, plain.name, Reference("limits")))
    after = limits(plain)
    assert after["data size"] - before["data size"] == HUGE_PAGE_SIZE
    assert after["address space"] - before["address space"] == 2 * HUGE_PAGE_SIZE


@pytest.fixture
def little(host: Runtime, python_root: Artifact) -> Iterator[GuestRecord]:
    """A guest with little room for translated code, which no user can ask for."""
    plan = replace(boot_plan(host, python_root.ref, command=""), translated=LEAST_TRANSLATED)
    guest = asyncio.run(start_one(host, plan, "little"))
    yield guest
    host.end(guest)


def test_translated_code(host: Runtime, little: GuestRecord, run_in: RunIn) -> None:
    """Under TCG a guest that works fills the memory for it, and takes no more."""
    # A boot alone is more code than there is room for.
    guest = little
    if guest.accel == "tcg":
        said = asyncio.run(_human(host, guest, "info jit"))
        (dropped,) = re.findall(r"TB flush count\s+(\d+)", said)
        assert int(dropped) >= 1, said
    work = (
        "import glob; [compile(open(f).read(), f, 'exec') for f in glob.glob('/usr/lib/py*/*.py')]"
    )
    done = run_in(guest, "python3", "-c", work, timeout=600)
    assert done.exit_code == 0, done.stderr
    own = [m for m in smaps.read(guest.pid) if not m.path.startswith("/") and m.size < guest.memory]
    code = sum(mapping.private for mapping in own if "x" in mapping.perms and not mapping.path)
    room = LEAST_TRANSLATED if guest.accel == "tcg" else 0
    assert room * 0.7 <= code <= room
    # What admission counts besides the guest's RAM.
    counted = admission.of_booted("kvm", 0).each + room
    assert sum(mapping.private for mapping in own) < counted


async def _human(host: Runtime, guest: GuestRecord, line: str) -> str:
    async with connect(host.run / guest.name) as monitor:
        return await monitor.human(line)


def test_a_guest_that_says_too_much(host: Runtime, clones: Clones, run_in: RunIn) -> None:
    """It goes on as before, what it says is dropped, and what it says later is there again."""
    (guest,) = clones(1)
    folder = host.run / guest.name
    console = folder / logs.CONSOLE
    room = console.stat().st_size + 64 * 1024
    flood = "yes $(seq 100) | head -c 200000 >/dev/ttyS0; echo; sleep 0.2; echo {} >/dev/ttyS0"
    with vmm_limits.writing_at_most(guest.pid, room):
        run_in(guest, "sh", "-c", flood.format("lost"))
        assert console.stat().st_size == room
        assert "lost" not in logs.read(folder, logs.CONSOLE)
        # No command comes by: it has had enough.
        assert run_in(guest, "hostname").stdout.decode().strip() == guest.name
        with host.locked():
            log_room.make_room(folder, guest.pid)
        run_in(guest, "sh", "-c", "echo found >/dev/ttyS0; sleep 0.2")
        assert "found" in logs.read(folder, logs.CONSOLE)
        assert (folder / "console.cut").exists()


def test_what_it_was_lent_is_not_what_is_stored(
    host: Runtime, clones: Clones, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VMM that keeps the file of its state, and writes to it when that has a name."""
    (guest,) = clones(1)
    kept: list[int] = []
    lent_copy = Monitor.lent_copy

    @contextlib.asynccontextmanager
    async def keeping(monitor: Monitor, fd: int) -> AsyncIterator[str]:
        async with lent_copy(monitor, fd) as path:
            yield path
            # The same open file as QEMU's.
            kept.append(os.dup(fd))

    monkeypatch.setattr(Monitor, "lent_copy", keeping)
    done = asyncio.run(save_guest(host, Reference("lent"), guest.name))
    (file,) = kept
    try:
        state = done.artifact.layer("state").path
        content = state.read_bytes()
        assert len(content) > 64 * 1024
        assert os.fstat(file).st_ino != state.stat().st_ino
        with pytest.raises(PermissionError):
            os.pwrite(file, b"evil", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(file, MIB)
        # It keeps nothing of the host's memory, either.
        assert os.fstat(file).st_blocks == 0
        assert state.read_bytes() == content
        host.store.verify(done.artifact)
    finally:
        os.close(file)
    assert limits(guest)["file size"] == LOG_ROOM


def test_a_state_larger_than_any(
    host: Runtime, clones: Clones, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU can write no more than the room for it, and the guest goes on."""
    (guest,) = clones(1)
    monkeypatch.setattr("onecopy.guest.lifecycle.snapshot.STATE_ROOM", 64 * 1024)
    with pytest.raises(GuestFailed, match="refused xen-save-devices-state"):
        asyncio.run(save_guest(host, Reference("large"), guest.name))
    assert host.store.find(Reference("large"), "system") is None
    assert limits(guest)["file size"] == LOG_ROOM


def test_a_state_that_was_changed_on_the_way(
    host: Runtime, saved: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is loaded is what was checked: the file is not looked at again."""
    layer = saved.layer("state")
    before = layer.path.read_bytes()
    source = clone_plan(host, saved)
    checked = Monitor.incoming

    async def changed(monitor: Monitor, fd: int) -> None:
        layer.path.chmod(0o644)
        layer.path.write_bytes(b"evil")
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"evil", 0)
        await checked(monitor, fd)

    monkeypatch.setattr(Monitor, "incoming", changed)
    try:
        guest = asyncio.run(start_one(host, source, "unchanged"))
        host.end(guest)
        monkeypatch.undo()
        with pytest.raises(StoreDamaged, match="has modified"):
            asyncio.run(start_one(host, source, "never"))
    finally:
        layer.path.write_bytes(before)
        layer.path.chmod(0o444)
    host.store.verify(saved)
