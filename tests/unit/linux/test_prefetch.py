"""prefetch: how far the kernel reads ahead. What is read and dropped: test_preload.py."""

import os
from pathlib import Path

import pytest

from onecopy.guest.observe import doctor
from onecopy.linux import prefetch
from onecopy.model import MIB


@pytest.fixture
def sys(tmp_path: Path) -> tuple[Path, str]:
    """A root folder with /sys, and what it calls the device of ``tmp_path``."""
    (tmp_path / "sys/class/bdi").mkdir(parents=True)
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    number = tmp_path.stat().st_dev
    return tmp_path / "sys", f"{os.major(number)}:{os.minor(number)}"


def test_of_a_partition_it_is_the_disks(tmp_path: Path, sys: tuple[Path, str]) -> None:
    root, name = sys
    disk = root / "devices/disk"
    (disk / "part").mkdir(parents=True)
    (root / "dev/block" / name).symlink_to(disk / "part")
    assert prefetch.read_ahead(tmp_path, tmp_path) is None
    (disk / "queue").mkdir()
    (disk / "queue/read_ahead_kb").write_text("128\n")
    assert prefetch.read_ahead(tmp_path, tmp_path) == 128 << 10


def test_what_is_no_disk(tmp_path: Path, sys: tuple[Path, str]) -> None:
    root, name = sys
    (root / "class/bdi" / name).mkdir()
    (root / "class/bdi" / name / "read_ahead_kb").write_text("4096\n")
    assert prefetch.read_ahead(tmp_path, tmp_path) == 4 * MIB


def test_doctor_tells_when_it_is_much() -> None:
    assert doctor._read_ahead(128 << 10).state == "ok"
    much = doctor._read_ahead(8 * MIB)
    assert much.state == "limited" and "8.0 MiB" in much.says and "read_ahead_kb" in much.says
    assert doctor._read_ahead(None).says == "unknown"
