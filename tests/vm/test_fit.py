"""Resources that guests get at their start beyond the saved ones: RAM, vCPUs, segments, disks.

Not here: refusals before a start (tests/unit/guest/test_resources.py), confinement of a VMM with a
disk (test_confinement.py), vCPUs under KVM (kvm/test_processors.py).
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onecopy import aio
from onecopy.errors import GuestFailed, InUse, InvalidInput, OnecopyError
from onecopy.guest.lifecycle import disks
from onecopy.guest.machine import SystemConfig
from onecopy.guest.observe.accounts import guest_maps
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.images.build import build_segment
from onecopy.model import MIB, Reference
from onecopy.sharing import report
from onecopy.store import Artifact
from tests.vm.conftest import Boot, RunIn, vmms
from tests.vm.guests import Guests

Fit = Callable[..., GuestRecord]
Say = Callable[[GuestRecord, str], str]


@pytest.fixture
def fit(host: Runtime, saved: Artifact, guests: Guests) -> Iterator[Fit]:
    """``fit(name, memory=...)`` starts a clone with that fitting; it and its disk end after it."""
    yield lambda name, **fitting: guests.clone(saved, name=name, **fitting)[0].record
    guests.end()
    for disk in disks.list_own_disks(host):
        disks.remove(host, disk.name)


@pytest.fixture
def say(run_in: RunIn) -> Say:
    """``say(guest, script)``: what a script prints in a guest; it must succeed."""

    def run(guest: GuestRecord, script: str) -> str:
        done = run_in(guest, "sh", "-ec", script)
        assert done.exit_code == 0, done
        return done.stdout.decode().strip()

    return run


def own(size: int, mountpoint: str = ":/data") -> list[str]:
    """A disk of its own, of ``size`` MiB."""
    return [f"{size}M{mountpoint}"]


def file(path: Path, mountpoint: str = "") -> list[str]:
    return [f"{path}{mountpoint}"]


@pytest.fixture(scope="module")
def notes(host: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("notes")
    (folder / "text").write_text("noted\n")
    return build_segment(host.store, Reference("notes"), f"dir:{folder}")


def test_memory_segment_and_disk(
    host: Runtime, saved: Artifact, fit: Fit, say: Say, notes: Artifact, guests: Guests
) -> None:
    before = SystemConfig.of(saved).memory
    memory = before + 256 * MIB
    guest = fit("web", memory=memory, segments=[f"{notes.ref}:/notes"], disks=own(24))
    assert (guest.memory, guest.added, guest.cpus) == (memory, 256 * MIB, 1)
    # More than was saved, of it in use by one program at once.
    total = say(guest, "awk '/MemTotal/ {print $2}' /proc/meminfo")
    assert int(total) * 1024 > before
    fill = f"b = bytearray(b'x') * {before + 16 * MIB}; print(b.count(b'x'))"
    assert say(guest, f'python3 -c "{fill}"') == str(before + 16 * MIB)
    (account,) = report.collect(guest_maps([guest])).guests
    assert (account.ram_size, account.note) == (memory, "")
    assert (account.ram_private or 0) > before // 2
    assert say(guest, "cat /notes/text; grep -c '/notes erofs ro.*dax' /proc/mounts") == "noted\n1"
    assert say(guest, "grep -c '^/dev/vda /data ext4 rw' /proc/mounts") == "1"
    assert say(guest, "readlink /dev/onecopy/disk0") == "/dev/vda"
    with pytest.raises(InvalidInput, match=r"web\.img, 256.0 MiB more memory"):
        guests.save(guest, "again")
    assert host.guest("web").record() == guest


def test_content_stays(host: Runtime, fit: Fit, say: Say, guests: Guests) -> None:
    first = fit("web", disks=own(24))
    assert first.disks[0].created
    say(first, "echo asked >/data/asked")
    assert guests.host.guest("web").stop(), "it should have shut down by itself"
    second = fit("web", disks=own(96))
    assert not second.disks[0].created
    assert say(second, "cat /data/asked") == "asked"
    assert int(say(second, "df -m /data | awk 'END {print $2}'")) > 64
    say(second, "echo synced >/data/synced; sync; echo lost >/data/lost")
    host.end(second)
    third = fit("web", disks=own(96, ":/elsewhere"))
    assert say(third, "cat /elsewhere/asked /elsewhere/synced") == "asked\nsynced"
    # Its host knows of it only by its name.
    assert say(fit("other", disks=own(16)), "ls /data") == "lost+found"


def test_files_as_disks(fit: Fit, guests: Guests, say: Say, tmp_path: Path) -> None:
    qcow2, raw = tmp_path / "a.qcow2", tmp_path / "b.img"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", qcow2, "64M"], check=True)
    raw.write_bytes(bytes(8 * MIB))
    subprocess.run(["/sbin/mke2fs", "-q", "-F", "-t", "ext4", raw], check=True)
    guest = fit("web", disks=file(qcow2) + file(raw, ":/raw"))
    fill = "tr '\\0' x </dev/zero | dd of=/dev/onecopy/disk0 bs=1M count=40"
    say(guest, f"{fill} iflag=fullblock conv=fsync")
    say(guest, "echo kept >/raw/file")
    with pytest.raises(InUse, match="in use by web") as caught:
        fit("other", disks=file(raw))
    assert caught.value.users == ("web",)
    assert subprocess.run(["qemu-img", "info", qcow2], capture_output=True).returncode == 1
    assert guests.host.guest(guest.name).stop()
    subprocess.run(["qemu-img", "check", "-q", qcow2], check=True)
    read = f"read -P {ord('x')} 0 40M"
    subprocess.run(["qemu-io", "-r", "-f", "qcow2", "-c", read, qcow2], check=True)
    said = subprocess.run(["/sbin/debugfs", "-R", "cat /file", raw], capture_output=True, text=True)
    assert said.stdout == "kept\n"


def test_a_cold_guest_has_one_too(
    boot: Boot, host: Runtime, busybox_root: Artifact, say: Say, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(2 * MIB))
    guest = boot(busybox_root, memory=128 * MIB, disks=file(disk))
    say(guest, "echo booted >/dev/onecopy/disk0; sync")
    assert disk.read_bytes().startswith(b"booted\n")


def test_each_of_several_has_its_own(
    host: Runtime, saved: Artifact, fit: Fit, say: Say, guests: Guests
) -> None:
    fit("web-3", disks=own(16, ""))
    # The third name is taken: none of them is there, and what was made for them is gone.
    with pytest.raises(OnecopyError):
        guests.clone(saved, 3, name="web", disks=own(16))
    assert [disk.name for disk in disks.list_own_disks(host)] == ["web-3"]
    two = [guest.record for guest in guests.clone(saved, 2, name="web", disks=own(16))]
    for guest in two:
        say(guest, "hostname >/data/name; sync")
    found = {disk.name: disk.guest for disk in disks.list_own_disks(host)}
    assert found == {name: name for name in ("web-1", "web-2", "web-3")}
    assert [say(guest, "cat /data/name") for guest in two] == ["web-1", "web-2"]


def test_what_fails_leaves_nothing(host: Runtime, fit: Fit, tmp_path: Path) -> None:
    before, raw = set(vmms(host)), tmp_path / "raw.img"
    raw.write_bytes(bytes(8 * MIB))
    with pytest.raises(GuestFailed, match="mounted on /proc"):
        fit("web", disks=own(16, ":/proc"))
    with pytest.raises(GuestFailed, match="Invalid argument") as caught:
        fit("web", disks=file(raw, ":/data"))
    assert "mkfs.ext4" in caught.value.hint
    assert disks.list_own_disks(host) == []
    assert set(vmms(host)) == before
    assert not (host.run / "web").exists()


def test_from_python(host: Runtime, saved: Artifact, fit: Fit, say: Say) -> None:
    async def write() -> None:
        async with (
            aio.Host(host.store.root) as mine,
            mine.start(saved.ref, name="web", disks=["16M:/data"]) as [guest],
        ):
            await guest.exec(["sh", "-c", "echo unsynced >/data/file"])

    asyncio.run(write())
    assert say(fit("web", disks=own(16)), "cat /data/file") == "unsynced"
