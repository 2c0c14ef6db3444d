"""Which file systems are not of this machine."""

import os
import subprocess
from pathlib import Path

import pytest

from onecopy.errors import Incompatible
from onecopy.linux import statfs
from onecopy.store import Store, opening
from tests.conftest import cannot_run

# f_type as statfs(2) told it there; coreutils' `stat -f -c %t` prints the same numbers.
RECORDED = {
    0xEF53: None,  # ext4
    0x58465342: None,  # XFS
    0x9123683E: None,  # btrfs
    0x1021994: None,  # tmpfs
    0x794C7630: None,  # overlayfs
    0x2FC12FC1: None,  # ZFS
    0x6969: "NFS",
    0xFE534D42: "SMB",
    -11317950: "CIFS",  # 0xff534d42, sign-extended
    0x1021997: "9p",
    0xC36400: "Ceph",
    0x6B414653: "AFS",
    0x65735546: "FUSE",
}


@pytest.mark.parametrize(("f_type", "name"), RECORDED.items())
def test_recorded_numbers(f_type: int, name: str | None) -> None:
    assert statfs.remote_name(f_type) == name


def test_file_systems_of_this_host(tmp_path: Path) -> None:
    for path in (Path("/dev/shm"), Path("/proc"), tmp_path):
        told = subprocess.run(
            ["/usr/bin/stat", "-f", "-c", "%t", path], capture_output=True, text=True, check=True
        )
        assert statfs._type(path) & 0xFFFFFFFF == int(told.stdout, 16)
    assert statfs.remote_kind(Path("/dev/shm")) is None
    with pytest.raises(FileNotFoundError, match="nowhere"):
        statfs.remote_kind(tmp_path / "nowhere")


def test_a_real_fuse_mount(tmp_path: Path) -> None:
    if os.geteuid():
        cannot_run("only root can mount a file system")
    try:
        fd = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        cannot_run(f"/dev/fuse: {error}")
    try:
        # Of a user who we are not: the kernel then answers statfs(2) without its server.
        options = f"fd={fd},rootmode=40000,user_id=65534,group_id=65534"
        done = subprocess.run(
            ["/bin/mount", "-i", "-t", "fuse", "-o", options, "none", tmp_path],
            pass_fds=[fd],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            cannot_run(f"mount: {done.stderr}")
        try:
            assert statfs.remote_kind(tmp_path) == "FUSE"
        finally:
            subprocess.run(["/bin/umount", "--lazy", tmp_path], check=True)
    finally:
        os.close(fd)


def test_a_store_there_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def remote_kind(path: Path) -> str:
        asked.append(path)
        return "NFS"

    monkeypatch.setattr(opening, "remote_kind", remote_kind)
    with pytest.raises(Incompatible, match="NFS") as error:
        Store(tmp_path / "a" / "b")
    assert "ONECOPY_HOME" in error.value.hint
    assert asked == [tmp_path]
    assert list(tmp_path.iterdir()) == []
