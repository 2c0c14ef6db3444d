"""What guests can be fitted with at their start, told before any is started; and their disks.

Not here: that guests have it (tests/vm/test_fit.py).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from onecopy.errors import (
    CommandFailed,
    InUse,
    InvalidInput,
    NotFound,
    OnecopyError,
    TooLarge,
)
from onecopy.guest.lifecycle import disks
from onecopy.guest.lifecycle.disks import DiskSpec, check_disks
from onecopy.guest.lifecycle.resources import NOTHING, ExtraResources, require_possible
from onecopy.guest.machine import SystemConfig
from onecopy.guest.runtime import Runtime
from onecopy.linux import disk_image
from onecopy.model import MIB, Reference
from onecopy.vmm.argv import cpu_room
from onecopy.vmm.confined_tool import run_on_file
from tests.conftest import cannot_run
from tests.unit.guest_kit import record

SAVED = SystemConfig(
    machine="pc-q35-7.2",
    cpu="max",
    cpus=1,
    memory=256 * MIB,
    network=True,
    accel="kvm",
    qemu="7.2",
    kernel="6.12",
    root="root:latest",
    command=None,
    machine_id=False,
    segments=(),
    cpu_room=8,
)


@pytest.fixture
def host(tmp_path: Path) -> Runtime:
    home = Runtime.open(tmp_path / "home")
    return replace(home, run=tmp_path)


def _refused(host: Runtime, wanted: ExtraResources, **changes: object) -> OnecopyError:
    with pytest.raises(OnecopyError) as caught:
        require_possible(host, wanted, msgspec.structs.replace(SAVED, **changes), "a was saved")
    assert caught.value.hint
    return caught.value


def test_what_is_possible(host: Runtime) -> None:
    for wanted in (
        NOTHING,
        ExtraResources(memory=256 * MIB, cpus=1),
        ExtraResources(memory=384 * MIB, cpus=8),
        ExtraResources(disks=(DiskSpec(size=MIB, mountpoint="/a"), DiskSpec(file=Path("x")))),
    ):
        require_possible(host, wanted, SAVED, "a was saved")


@pytest.mark.parametrize(
    ("memory", "error", "says"),
    [
        (128, InvalidInput, "saved with 256.0 MiB of RAM, and cannot have less"),
        (300, InvalidInput, "steps of 128 MiB"),
        (256 * 18, TooLarge, "can get at most"),
    ],
)
def test_memory_that_cannot_be(host: Runtime, memory: int, error: type, says: str) -> None:
    found = _refused(host, ExtraResources(memory=memory * MIB))
    assert isinstance(found, error)
    assert says in found.message


def test_the_hint_is_what_can_be(host: Runtime) -> None:
    assert _refused(host, ExtraResources(memory=300 * MIB)).hint == "give --memory 256M or 384M"


@pytest.mark.parametrize(
    ("cpus", "changes", "error", "says"),
    [
        (1, {"cpus": 2}, InvalidInput, "--cpus 2, and cannot have fewer"),
        (9, {}, TooLarge, "can have at most 8"),
        (3, {"cpu_room": 2}, TooLarge, "can have at most 2"),
        (2, {"cpu_room": 0}, TooLarge, "can have at most 1"),
        (2, {"cpu_room": 1, "accel": "tcg"}, TooLarge, "under tcg Linux cannot add vCPUs"),
    ],
)
def test_processors_that_cannot_be(
    host: Runtime, cpus: int, changes: dict[str, object], error: type, says: str
) -> None:
    found = _refused(host, ExtraResources(cpus=cpus), **changes)
    assert isinstance(found, error)
    assert says in found.message


@pytest.mark.parametrize(("cpus", "room"), [(1, 8), (2, 8), (3, 9), (8, 8), (12, 12)])
def test_room_for_processors(cpus: int, room: int) -> None:
    assert cpu_room(cpus) == room


@pytest.mark.parametrize(
    "wanted",
    [
        ExtraResources(memory=384 * MIB),
        ExtraResources(cpus=2),
        ExtraResources(segments=((Reference("a"), ""),)),
        ExtraResources(disks=(DiskSpec(size=16 * MIB),)),
    ],
    ids=["memory", "cpus", "segment", "disk"],
)
def test_a_bare_machine_is_given_nothing(host: Runtime, wanted: ExtraResources) -> None:
    assert "bare machine" in _refused(host, wanted, agent=False).message


def test_mount_points_and_segments(host: Runtime) -> None:
    twice = (DiskSpec(size=MIB, mountpoint="/a"), DiskSpec(file=Path("x"), mountpoint="/a"))
    assert "mount point /a is given twice" in _refused(host, ExtraResources(disks=twice)).message
    outside = (DiskSpec(size=MIB, mountpoint="/a/.."),)
    assert "not a mount point" in _refused(host, ExtraResources(disks=outside)).message
    assert isinstance(_refused(host, ExtraResources(segments=((Reference("none"), ""),))), NotFound)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("64M", DiskSpec(size=64 * MIB)),
        ("1000K", DiskSpec(size=MIB)),
        ("1G:/data/", DiskSpec(size=1024 * MIB, mountpoint="/data")),
        ("disk.qcow2", DiskSpec(file=Path("disk.qcow2"))),
        ("./1G:/data", DiskSpec(file=Path("1G"), mountpoint="/data")),
        ("a:/b:/data", DiskSpec(file=Path("a:/b"), mountpoint="/data")),
    ],
)
def test_what_a_user_types(text: str, spec: DiskSpec) -> None:
    assert DiskSpec.parse(text) == spec


OWN, FILE = DiskSpec(size=16 * MIB), DiskSpec(file=Path("x"))


@pytest.mark.parametrize(
    ("specs", "named", "count", "says"),
    [
        ((OWN, OWN), True, 1, "one disk of its own"),
        ((OWN,), False, 1, "needs a guest with a name"),
        ((DiskSpec(size=15 * MIB),), True, 1, "too small"),
        ((FILE,), True, 2, "one disk image"),
        ((OWN, FILE), True, 2, "one disk image"),
    ],
)
def test_disks_that_do_not_go_together(
    specs: tuple[DiskSpec, ...], named: bool, count: int, says: str
) -> None:
    with pytest.raises(InvalidInput, match=says):
        check_disks(specs, named=named, count=count)
    check_disks((OWN, FILE, FILE), named=True, count=1)
    check_disks((OWN,), named=True, count=3)
    check_disks((FILE,), named=False, count=1)


def test_a_disk_of_a_guest_s_own(host: Runtime) -> None:
    with disks.opened(host, "web", OWN) as made:
        assert (made.form, made.made) == ("raw", True)
        assert disk_image.file_system_size(made.fd) == 16 * MIB
        assert made.path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(InUse, match="another program"), disks.opened(host, "web", OWN):
            pass
        with pytest.raises(InUse):
            disks.remove(host, "web")
    (found,) = disks.list_own_disks(host)
    assert (found.name, found.size, found.guest) == ("web", 16 * MIB, "")
    assert 0 < found.allocated < found.size
    with disks.opened(host, "web", DiskSpec(size=64 * MIB)) as larger:
        assert (larger.made, disk_image.file_system_size(larger.fd)) == (False, 64 * MIB)
        assert os.fstat(larger.fd).st_uid == os.geteuid()
    with pytest.raises(InvalidInput, match="cannot shrink"), disks.opened(host, "web", OWN):
        pass
    host.store.sweep()
    disks.remove(host, "web")
    assert disks.list_own_disks(host) == []
    with pytest.raises(NotFound):
        disks.remove(host, "web")


def test_one_that_was_made_goes_if_its_start_fails(host: Runtime) -> None:
    with pytest.raises(RuntimeError), disks.opened(host, "web", OWN):
        raise RuntimeError
    assert disks.list_own_disks(host) == []
    with disks.opened(host, "web", OWN):
        pass
    with pytest.raises(RuntimeError), disks.opened(host, "web", OWN):
        raise RuntimeError
    assert [disk.name for disk in disks.list_own_disks(host)] == ["web"]


def test_no_room_for_a_disk(host: Runtime) -> None:
    with pytest.raises(OnecopyError), disks.opened(host, "web", DiskSpec(size=1 << 62)):
        pass
    assert disks.list_own_disks(host) == []
    assert list((host.store.root / "tmp").iterdir()) == []


@pytest.mark.parametrize("what", ["none", "folder", "empty", "pipe", "store", "text.qcow2"])
def test_files_that_are_no_disks(host: Runtime, tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    match what:
        case "folder":
            path.mkdir()
        case "empty":
            path.touch()
        case "pipe":
            os.mkfifo(path)
        case "store":
            path = host.store.root / "index.json"
        case "text.qcow2":
            path.write_text("text")
    with (
        pytest.raises((InvalidInput, NotFound)) as caught,
        disks.opened(host, "web", DiskSpec(file=path)),
    ):
        pass
    assert caught.value.hint


def test_a_file_in_use_names_its_guest(
    host: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    spec = DiskSpec(file=path)
    with disks.opened(host, "web", spec) as mine:
        from onecopy.guest.run_directory import GuestDisk

        disk = GuestDisk("disk0", str(mine.path), "raw", False, "", "01:01")
        guests = [record("web", disks=(disk,))]
        monkeypatch.setattr(Runtime, "guests", lambda _: guests)
        with pytest.raises(InUse) as caught, disks.opened(host, "other", spec):
            pass
        assert caught.value.users == ("web",)


def test_a_file_that_may_not_be_written(host: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    if os.geteuid() == 0:
        if subprocess.run(["chattr", "+i", path], check=False, capture_output=True).returncode:
            cannot_run("this file system has no immutable files, and root may write to others")
    else:
        path.chmod(0o400)
    try:
        with (
            pytest.raises(OnecopyError) as caught,
            disks.opened(host, "web", DiskSpec(file=path)),
        ):
            pass
        assert caught.value.id == "not-permitted"
    finally:
        subprocess.run(["chattr", "-i", path], check=False, capture_output=True)


def test_a_program_on_a_file_reaches_no_other(tmp_path: Path) -> None:
    """Nothing but the file: neither one beside it, nor a name in its own folder."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.write_text("mine")
    other.write_text("other")
    fd = os.open(mine, os.O_RDWR)
    script = f'read x <{other}; echo >{tmp_path}/new; echo >>{other}; echo new >"$0"; exit 3'
    with pytest.raises(CommandFailed) as caught:
        run_on_file(["sh", "-c", script], fd)
    owner = os.fstat(fd).st_uid
    os.close(fd)
    assert caught.value.returncode == 3
    assert caught.value.output.count("ermission denied") >= 2, caught.value.output
    assert (mine.read_text(), other.read_text(), owner) == ("new\n", "other", os.geteuid())
    assert not (tmp_path / "new").exists()
