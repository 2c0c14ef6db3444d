"""Disk images as a source, as far as no reader is needed: formats, tables, fstab, what is refused.

Real images, made by the programs that users make theirs with. Not here: what a reader finds in them
(vm/test_disk_images.py).
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from onecopy.errors import BadSource
from onecopy.images.disk_format import DiskFormat, find_format
from onecopy.images.fstab import find_partition, parse_fstab
from onecopy.images.partitions import Partition, parse_table
from onecopy.images.source import open_source
from onecopy.images.sources.disk import open_disk
from onecopy.linux.disk_image import lock, lock_for_reading
from onecopy.model import MIB
from onecopy.store import Store
from tests.conftest import cannot_run

FORMATS = ("qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc")
CREATE = ("qemu-img", "create", "-q", "-f")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def made(path: Path, form: str, *options: str, size: str = "20M") -> Path:
    sizes = [size] if size else []
    subprocess.run([*CREATE, form, *options, path, *sizes], check=True, capture_output=True)
    return path


def found(path: Path) -> DiskFormat:
    with path.open("rb") as file:
        return find_format(file.fileno())


@pytest.mark.parametrize("form", FORMATS)
def test_a_format_is_told_by_its_head(tmp_path: Path, form: str) -> None:
    """Whatever it is called, and whoever may read it."""
    path = made(tmp_path / "image.raw", form)
    path.chmod(0o400)
    assert found(path).driver == form
    # A VHD has whole cylinders.
    assert 20 * MIB <= found(path).size < 21 * MIB


def test_anything_else_is_raw(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(os.urandom(64) + bytes(MIB))
    assert found(path) == DiskFormat("raw", MIB + 64)
    path.write_bytes(b"")
    assert found(path) == DiskFormat("raw", 0)
    path.write_bytes(b"QFI\xfb")
    with pytest.raises(BadSource):
        found(path)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that no image may lead to: to open it would be to wait for ever."""
    path = tmp_path / "secret"
    os.mkfifo(path)
    return path


def _over(path: Path, secret: Path) -> None:
    made(path, "qcow2", "-u", "-b", str(secret), "-F", "raw")


def _qed(path: Path, secret: Path) -> None:
    made(path, "qed", "-u", "-b", str(secret), "-F", "raw")


def _apart(path: Path, secret: Path) -> None:
    other = path.with_name("data")
    made(path, "qcow2", "-o", f"data_file={other}", size="4M")
    text = path.read_bytes()
    path.write_bytes(text.replace(os.fsencode(other), os.fsencode(secret)[: len(str(other))]))


def _vmdk(path: Path, secret: Path) -> None:
    made(path.with_name("base.vmdk"), "vmdk")
    made(path, "vmdk", "-b", str(path.with_name("base.vmdk")), "-F", "vmdk", size="")
    text = path.read_bytes()
    name = os.fsencode(path.with_name("base.vmdk"))
    assert text.count(name)
    path.write_bytes(text.replace(name, os.fsencode(secret).rjust(len(name), b"/")))


def _extents(path: Path, secret: Path) -> None:
    path.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW 8192 FLAT "{secret}" 0\n'
    )


def _embedded(path: Path, secret: Path) -> None:
    """A sparse VMDK whose head says that it is but a list of others."""
    made(path, "vmdk")
    with path.open("r+b") as file:
        file.seek(12)
        file.write(bytes(8))
        file.seek(512)
        file.write(f'# Disk DescriptorFile\nRW 8192 FLAT "{secret}" 0\n'.encode())


def _parent(path: Path, secret: Path) -> None:
    made(path, "vpc")
    with path.open("r+b") as file:
        file.seek(60)
        file.write(struct.pack(">I", 4))


@pytest.mark.parametrize("make", [_over, _qed, _apart, _vmdk, _extents, _embedded, _parent])
def test_an_image_that_leads_to_other_files(
    tmp_path: Path, secret: Path, make: Callable[[Path, Path], None]
) -> None:
    make(tmp_path / "image", secret)
    with pytest.raises(BadSource, match="must be one file") as caught:
        found(tmp_path / "image")
    assert "convert" in caught.value.hint


def test_an_encrypted_image(tmp_path: Path) -> None:
    """By the method in a qcow2's head, and LUKS as it is; to make real ones takes seconds."""
    path = made(tmp_path / "image", "qcow2")
    with path.open("r+b") as file:
        file.seek(32)
        file.write(struct.pack(">I", 2))
    (tmp_path / "luks").write_bytes(b"LUKS\xba\xbe\x00\x02" + bytes(MIB))
    for image in (path, tmp_path / "luks"):
        with pytest.raises(BadSource, match="encrypted") as caught:
            found(image)
        assert "cryptsetup" in caught.value.hint


def test_an_image_that_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(os.urandom(4 * MIB))
    for form in FORMATS:
        path = tmp_path / form
        subprocess.run(["qemu-img", "convert", "-O", form, tmp_path / "raw", path], check=True)
        os.truncate(path, 2 * MIB)
        with pytest.raises(BadSource) as caught:
            found(path)
        assert "truncated or damaged" in caught.value.hint


def test_sizes_beyond_reason(tmp_path: Path) -> None:
    """As a head says them, and as a file has them."""
    path = made(tmp_path / "image", "qcow2")
    for size in (1 << 60, (1 << 64) - 512):
        with path.open("r+b") as file:
            file.seek(24)
            file.write(struct.pack(">Q", size))
        with pytest.raises(BadSource):
            found(path)
    with path.open("r+b") as file:
        file.seek(36)
        # Entries of the first table.
        file.write(struct.pack(">I", 0x7FFFFFFF))
    with pytest.raises(BadSource):
        found(path)


def test_what_is_no_file_is_not_opened(tmp_path: Path, store: Store) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(BadSource, match="is not a regular file") as caught:
            open_disk(str(path), store)
        assert caught.value.hint


def test_an_image_that_becomes_a_pipe(tmp_path: Path, store: Store) -> None:
    (tmp_path / "image").write_bytes(bytes(MIB))
    source = open_disk(f"{tmp_path}/image", store)
    (tmp_path / "image").unlink()
    os.mkfifo(tmp_path / "image")
    with pytest.raises(BadSource, match="is not a regular file"):
        source.unpack(tmp_path / "tree", lambda _: None)


def test_a_machine_that_runs_from_it(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(MIB))
    with path.open("r+b") as file:
        assert lock(file.fileno())
        with pytest.raises(BadSource, match="a running machine has it open"):
            open_disk(str(path), store).unpack(tmp_path / "tree", lambda _: None)
    with path.open("rb") as one, path.open("rb") as two, path.open("r+b") as writer:
        assert lock_for_reading(one.fileno())
        assert lock_for_reading(two.fileno())
        assert not lock(writer.fileno())
        # QEMU itself heeds it, and says so.
        argv = ["qemu-io", "-f", "raw", "-c", "write 0 512", str(path)]
        said = subprocess.run(argv, capture_output=True, text=True)
        assert "lock" in said.stderr
        one.close()
        two.close()
        assert lock(writer.fileno())


def test_names_that_are_no_images(tmp_path: Path, store: Store) -> None:
    if os.geteuid() != 0:
        cannot_run("disk: is root's")
    for name, said in (
        ("missing", "No such file"),
        ("missing#1", "No such file"),
        (".", "not a regular file"),
    ):
        with pytest.raises(BadSource, match=said) as caught:
            open_source(f"disk:{tmp_path}/{name}", store=store)
        assert caught.value.hint


def test_a_name_with_a_number_sign(tmp_path: Path, store: Store) -> None:
    (tmp_path / "my#image").touch()
    assert open_disk(f"{tmp_path}/my#image", store).partition is None
    assert open_disk(f"{tmp_path}/my#image#3", store).partition == 3


TABLE = """\
disk 67108864
ID_PART_TABLE_TYPE=gpt
partition 1 2048 1048576 0xef 1d6974ae-9138-2a4b-8c22-0b841d6d25e6 my\\x20esp
ID_FS_UUID_ENC=4A2B-1C3D
ID_FS_TYPE=vfat
partition 2 4096 20971520 0fc63daf-8483-4772-8e79-3d69d8477de4 c26ad6ae-e1c6-6b4e-8f55-869d200148dc
ID_FS_TYPE=ext4
ID_FS_UUID_ENC=a9026023-fd63-4506-ac3f-2324136ac19a
ID_FS_LABEL_ENC=the\\x20root
partition 3 0 4096 0x5
partition 5 49152 4096 0x83
"""


def test_a_table() -> None:
    esp, root, rest = parse_table(TABLE.splitlines())
    assert (esp.number, esp.fs, esp.part_label, esp.mountable) == (1, "vfat", "my esp", False)
    assert (root.number, root.fs, root.label, root.mountable) == (2, "ext4", "the root", True)
    assert str(rest) == "#5 (4.0 KiB): no file system"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("disk 0", "neither a file system"),
        ("disk 100\nID_PART_TABLE_TYPE=PMBR", "truncated"),
        ("disk 100\nID_PART_TABLE_TYPE=gpt", "is empty or unreadable"),
        (TABLE.replace("67108864", "8388608"), "truncated: partition 2 ends at byte 23068672"),
        (TABLE + "partition 6 many", "malformed"),
        (TABLE + "partition 6 1 1\n" * 200, "more than 128"),
    ],
)
def test_a_table_that_cannot_be(text: str, said: str) -> None:
    with pytest.raises(BadSource, match=said) as caught:
        parse_table(text.splitlines())
    assert caught.value.hint


FSTAB = """\
# a comment
UUID=a9026023-FD63-4506-AC3F-2324136ac19a / ext4 defaults 0 1
/dev/sda3 /var/lib/one ext4 defaults
LABEL=home  /home/ btrfs subvol=@home,noatime 0 0
/dev/disk/by-partlabel/my\\040esp /a\\040b/../c vfat
/dev/sda4 none swap sw 0 0
proc /proc proc
/home/x /srv none bind
broken
tmpfs /tmp tmpfs
"""


def test_lines_of_an_fstab() -> None:
    entries = parse_fstab(FSTAB)
    assert [(each.device, each.target) for each in entries] == [
        ("/dev/sda4", ""),
        ("LABEL=home", "/home"),
        ("/dev/disk/by-partlabel/my esp", "/c"),
        ("/dev/sda3", "/var/lib/one"),
    ]
    assert entries[1].subvolume == "subvol=@home"
    assert len(parse_fstab("/dev/sda1 /x ext4\n" * 100_000)) == 64


@pytest.mark.parametrize(
    ("device", "number"),
    [
        ("UUID=AAAA-1", 1),
        ('LABEL="the root"', 2),
        ("LABEL=The Root", None),
        ("PARTUUID=BBBB-02", 2),
        ("/dev/disk/by-partlabel/efi", 1),
        ("/dev/sda2", 2),
        ("/dev/vda2", 2),
        ("/dev/xvda1", 1),
        ("/dev/nvme0n1p2", 2),
        ("/dev/sdb2", None),
        ("/dev/sda9", None),
        ("/dev/mapper/vg-root", None),
        ("UUID=", None),
        ("server:/share", None),
        ("LABEL=twice", None),
    ],
)
def test_which_partition_an_fstab_means(device: str, number: int | None) -> None:
    partitions = [
        Partition(1, MIB, "ext4", uuid="aaaa-1", part_label="efi"),
        Partition(2, MIB, "ext4", label="the root", part_uuid="bbbb-02"),
        Partition(3, MIB, "ext4", label="twice"),
        Partition(4, MIB, "ext4", label="twice"),
    ]
    partition = find_partition(device, partitions)
    assert (partition and partition.number) == number
