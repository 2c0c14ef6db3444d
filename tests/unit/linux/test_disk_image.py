"""linux/disk_image.py: heads of real and made-up images, and the lock that QEMU's tools heed."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecopy.errors import InvalidInput
from onecopy.linux import disk_image
from onecopy.model import MIB
from tests.conftest import cannot_run


def _head(**changes: int) -> bytes:
    """The head of a qcow2 image of version 3 that stands alone; see docs/interop/qcow2.txt."""
    fields = {"version": 3, "backing": 0, "encrypted": 0, "features": 0} | changes
    return struct.pack(
        ">4sIQIIQIIQQIIQQ",
        *(b"QFI\xfb", fields["version"], fields["backing"], 0, 16, MIB, fields["encrypted"]),
        *(0, 0, 0, 0, 0, 0, fields["features"]),
    )


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_raw_and_qcow2_by_name(file: int) -> None:
    assert disk_image.format_of(file, "disk.img") == "raw"
    os.pwrite(file, _head(), 0)
    assert disk_image.format_of(file, "disk.qcow2") == "qcow2"


@pytest.mark.parametrize("name", ["disk.qcow2", "disk.qcow2.img", "disk"])
def test_a_head_that_its_name_denies(file: int, name: str) -> None:
    os.pwrite(file, b"raw" if name.endswith(".qcow2") else _head(), 0)
    with pytest.raises(InvalidInput, match="contradicts its name"):
        disk_image.format_of(file, name)


@pytest.mark.parametrize(
    "head",
    [_head(backing=112), _head(encrypted=1), _head(encrypted=2), _head(features=4)],
    ids=["backing file", "AES", "LUKS", "data file"],
)
def test_an_image_that_does_not_stand_alone(file: int, head: bytes) -> None:
    os.pwrite(file, head, 0)
    with pytest.raises(InvalidInput, match="needs another file"):
        disk_image.format_of(file, "disk.qcow2")


def test_the_head_of_version_2_has_no_features(file: int) -> None:
    os.pwrite(file, _head(version=2, features=4), 0)
    assert disk_image.format_of(file, "disk.qcow2") == "qcow2"


def test_a_head_that_is_cut_off(file: int) -> None:
    os.pwrite(file, _head()[:40], 0)
    with pytest.raises(InvalidInput, match="shorter than a qcow2 header"):
        disk_image.format_of(file, "disk.qcow2")


@pytest.mark.parametrize("features", ["64bit", "^64bit"])
def test_the_size_of_an_ext4(tmp_path: Path, features: str) -> None:
    path = tmp_path / "image"
    subprocess.run(["truncate", "-s", "40M", path], check=True)
    fd = os.open(path, os.O_RDWR)
    assert disk_image.file_system_size(fd) is None
    options = ["-q", "-F", "-t", "ext4", "-O", features]
    subprocess.run(["/sbin/mke2fs", *options, path, "24M"], check=True, capture_output=True)
    assert disk_image.file_system_size(fd) == 24 * MIB
    os.close(fd)


def test_one_has_it_at_a_time(tmp_path: Path, file: int) -> None:
    other = os.open(tmp_path / "image", os.O_RDWR)
    assert not disk_image.is_used(other)
    assert disk_image.lock(file)
    assert disk_image.lock(file)
    assert not disk_image.lock(other)
    assert disk_image.is_used(other)
    copy = os.dup(file)
    os.close(file)
    assert not disk_image.lock(other), "a copy of the descriptor keeps it"
    os.close(copy)
    assert disk_image.lock(other)
    os.dup2(other, file)
    os.close(other)


def test_qemu_s_tools_heed_it(tmp_path: Path) -> None:
    if shutil.which("qemu-img") is None:
        cannot_run("there is no qemu-img")
    path = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    fd = os.open(path, os.O_RDWR)
    assert disk_image.format_of(fd, path.name) == "qcow2"
    assert disk_image.lock(fd)
    info = ["qemu-img", "info", str(path)]
    denied = subprocess.run(info, capture_output=True, text=True, check=False)
    assert denied.returncode == 1
    assert "lock" in denied.stderr
    os.close(fd)
    subprocess.run(info, capture_output=True, check=True)
