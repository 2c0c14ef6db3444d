"""Disk images as a source, read by a reader guest: their files, and refusals.

A reader takes seconds to boot, so each disk tests many cases. Not here: images that are refused
without a reader (tests/unit/images/test_disk.py), malicious readers (hostile/test_reader.py).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from onecopy.errors import BadSource, InsufficientResources
from onecopy.guest.runtime import Runtime
from onecopy.images.disk_files import DiskTree
from onecopy.images.disk_format import find_format
from onecopy.images.disk_reader import Reader, reader
from onecopy.images.fs_image import make_image
from onecopy.images.reader_initramfs import reader_parts
from onecopy.images.sources.disk import open_disk
from onecopy.model import MIB
from onecopy.subprocesses import run
from onecopy.vmm.reader_vm import Disk
from tests.disk_kit import disk, facts, file_system, known, make_tree

#: A machine's disk: EFI, its root, what its fstab mounts of it, and what nobody does.
GPT = """\
label: gpt
size=1M, type=U
{}, type=L
{}, type=L
{}, type=L
{}, type=L, name="my data"
{}, type=L
{}, type=S
{}, type=L
"""
FSTAB = """\
# <file system> <mount point> <type> <options>
/dev/sda2 / ext4 errors=remount-ro 0 1
PARTLABEL=my\\040data /srv/my\\040data ext3 defaults 0 2
LABEL=homes /home btrfs subvol=@home,noatime 0 0
/dev/disk/by-uuid/{xfs} /var xfs defaults 0 2
/dev/sda6 /var/deep ext2 defaults 0 2
/dev/sdb1 /elsewhere ext4 defaults 0 2
server:/share /nfs nfs defaults 0 0
/dev/sda7 none swap sw 0 0
tmpfs /tmp tmpfs size=1m 0 0
"""
#: What programs had made sure is on the disk when the power went.
CRASH = "for n in 1 2 3; do dd if=/dev/urandom of=kept$n bs=5000 count=1 conv=fsync; done"
LUKS = b"LUKS\xba\xbe\x00\x02"


class Unpacked(msgspec.Struct, frozen=True):
    tree: Path
    left_out: list[str]
    said: list[str]


def unpack(
    host: Runtime, source: str, work: Path, meanwhile: Callable[[], object] = lambda: None
) -> Unpacked:
    into, said = work / "tree", list[str]()
    into.mkdir(parents=True)
    opened = open_disk(source, host.store)

    def progress(text: str) -> None:
        said.append(text)
        if text.startswith("reading"):
            meanwhile()

    try:
        opened.unpack(into, progress)
    finally:
        assert [path.name for path in work.iterdir()] == ["tree"]
        assert str(work) not in Path("/proc/mounts").read_text()
    return Unpacked(into, opened.left_out, said)


@contextmanager
def booted(host: Runtime, image: Path, work: Path) -> Iterator[Reader]:
    """A reader of an image that may be asked for more than one of its trees."""
    work.mkdir()
    with image.open("rb") as file, (work / "overlay").open("w+b") as overlay:
        form = find_format(file.fileno())
        run(["qemu-img", "create", "-q", "-f", "qcow2", overlay.name, str(form.size)])
        parts = reader_parts(host.store, work, lambda _: None)
        with reader(parts, Disk(file.fileno(), form.driver, overlay.fileno())) as guest:
            yield guest


def copied(guest: Reader, wanted: int | None, into: Path) -> tuple[Path, list[str]]:
    into.mkdir()
    tree = DiskTree(guest, wanted)
    tree.copy(into)
    return into, tree.left_out()


@pytest.fixture(scope="module")
def machine(host: Runtime, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Unpacked]:
    """The parts of a machine's disk, and what was unpacked of it."""
    here = tmp_path_factory.mktemp("machine")
    root = make_tree(here / "root")
    for name in ("home", "var", "srv/my data", "nfs", "elsewhere"):
        (root / name).mkdir(parents=True)
    (root / "home/hidden").touch()
    for name in ("homes/@home/me", "homes/@snapshot", "var/deep", "data/lost+found", "deep"):
        (here / name).mkdir(parents=True)
    for name in ("homes/@home/me/file", "var/log", "data/lost+found/it", "deep/est"):
        (here / name).write_text(name)
    xfs = file_system(here / "var", "xfs", crash=CRASH)
    (root / "etc/fstab").write_text(FSTAB.format(xfs=known(xfs, "UUID")))
    plain = file_system(root, "ext4", crash=CRASH)
    swap = here / "swap"
    swap.write_bytes(bytes(4 * MIB))
    subprocess.run(["mkswap", "-q", swap], check=True, capture_output=True)
    subvolumes, crash = "@home @snapshot", f"cd @home; {CRASH}"
    homes = here / "homes"
    homes = file_system(homes, "btrfs", "-L homes", subvolumes=subvolumes, crash=crash)
    contents = [plain, homes, xfs, file_system(here / "data", "ext3")]
    contents += [file_system(here / "deep", "ext2"), swap, here / "luks"]
    (here / "luks").write_bytes(LUKS.ljust(MIB, b"\0"))
    image = disk(here / "disk", GPT, [None, *contents])
    before = hashlib.sha256(image.read_bytes()).digest()
    (here / "same").hardlink_to(image)
    # It is one that leads elsewhere by the time that it is read.
    other = here / "other"
    create = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw"]
    subprocess.run([*create, other, "4M"], check=True)
    found = unpack(host, str(image), here / "work", lambda: other.replace(image))
    assert image.stat().st_size < MIB
    assert hashlib.sha256((here / "same").read_bytes()).digest() == before
    return here, found


def test_a_machine_s_files_are_where_it_has_them(machine: tuple[Path, Unpacked]) -> None:
    here, found = machine
    mine, theirs = facts(found.tree), facts(here / "root")
    # What a mount hides, what the crash left, and the folder that it was left in.
    changed = {".", "home", "home/hidden", "var", "srv/my data"}
    assert {k: v for k, v in theirs.items() if k not in changed}.items() <= mine.items()
    assert (found.tree / "home/me/file").read_text() == "homes/@home/me/file"
    assert (found.tree / "var/log").read_text() == "var/log"
    assert (found.tree / "var/deep/est").read_text() == "deep/est"
    assert not (found.tree / "home/hidden").exists()
    assert (found.tree / "hole").stat().st_blocks == 0


def test_what_was_made_sure_before_a_crash_is_there(machine: tuple[Path, Unpacked]) -> None:
    """On ext4, btrfs and XFS: their journals were replayed, and not on the image (fixture)."""
    _, found = machine
    for folder in (".", "home", "var"):
        kept = sorted(path.stat().st_size for path in (found.tree / folder).glob("kept*"))
        assert kept == [5000] * 3, folder


def test_what_is_left_out_is_told(machine: tuple[Path, Unpacked]) -> None:
    _, found = machine
    assert found.left_out == [
        "#1 (1.0 MiB): no file system",
        "#7 (4.0 MiB): swap",
        "#8 (1.0 MiB): encrypted (LUKS)",
        "/elsewhere (/dev/sdb1), which is not on this disk",
        "/nfs (server:/share), which is not on this disk",
        "1 socket",
        "the content of /srv/my data/lost+found",
        "the subvolume @snapshot",
    ]


@pytest.fixture(scope="module")
def two_roots(
    host: Runtime, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Reader]]:
    """A qcow2 with an MBR: a root in a subvolume, another root, no root; and its reader."""
    here = tmp_path_factory.mktemp("two")
    tree = make_tree(here / "tree")
    (tree / "etc/fstab").symlink_to("/etc/shadow")
    (here / "top/@").mkdir(parents=True)
    subprocess.run(["cp", "-a", f"{tree}/.", here / "top/@"], check=True)
    (here / "link").mkdir()
    (here / "link/@").symlink_to("/")
    contents = [file_system(here / "top", "btrfs", subvolumes="@"), None, file_system(tree, "xfs")]
    (here / "damaged/etc").mkdir(parents=True)
    contents += [file_system(here / "link", "btrfs"), damaged(here / "damaged", "continue")]
    table = "label: dos\n{}, type=L\ntype=5\n{}, type=L\n{}, type=L\n{}, type=L\n"
    raw = disk(here / "raw", table, contents)
    image = here / "disk.qcow2"
    subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", raw, image], check=True)
    image.chmod(0o600)
    with booted(host, image, here / "work") as guest:
        yield here, guest


def test_two_roots(two_roots: tuple[Path, Reader]) -> None:
    _, guest = two_roots
    with pytest.raises(BadSource, match="several partitions hold a root") as caught:
        DiskTree(guest, None)
    assert "#1 (128.0 MiB): btrfs, a root\n" in caught.value.message
    assert "#6 (128.0 MiB): btrfs, not a root" in caught.value.message
    assert "disk:FILE#NUMBER" in caught.value.hint
    with pytest.raises(BadSource, match="partition 9 does not exist"):
        DiskTree(guest, 9)


def test_each_root_as_it_is(two_roots: tuple[Path, Reader]) -> None:
    """btrfs in a subvolume, and XFS; the same again gives the same image."""
    here, guest = two_roots
    digests = []
    for turn, number in enumerate((1, 5, 1)):
        tree, left_out = copied(guest, number, here / f"{turn}")
        assert facts(tree) == facts(here / "tree")
        assert "1 socket" in left_out and "#6 (128.0 MiB): btrfs" in left_out
        assert any(each.startswith("all mounts of /etc/fstab, because") for each in left_out)
        make_image(tree, here / f"{turn}.image", "erofs")
        digests.append(hashlib.sha256((here / f"{turn}.image").read_bytes()).digest())
    assert digests[0] == digests[2]


def test_a_folder_that_is_no_root_leads_nowhere(two_roots: tuple[Path, Reader]) -> None:
    here, guest = two_roots
    tree, _ = copied(guest, 6, here / "6")
    assert (tree / "@").readlink() == Path("/")


def test_a_disk_that_is_full(two_roots: tuple[Path, Reader]) -> None:
    here, guest = two_roots
    small = here / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k,nr_inodes=64", "small", str(small)]
    subprocess.run(mount, check=True)
    try:
        with pytest.raises(InsufficientResources) as caught:
            copied(guest, 1, small / "tree")
    finally:
        subprocess.run(["umount", small], check=True)
    assert caught.value.what == "disk"


def damaged(tree: Path, then: str) -> Path:
    """An ext4 in which the blocks of one folder are bad, and what it says to do ``then``."""
    for number in range(40):
        (tree / f"etc/{'x' * 200}{number}").touch()
    image = file_system(tree, "ext4")
    subprocess.run(["tune2fs", "-e", then, image], check=True, capture_output=True)
    asked = ["debugfs", "-R", "blocks /etc", str(image)]
    blocks = subprocess.run(asked, check=True, capture_output=True).stdout.split()
    size = int(known(image, "BLOCK_SIZE"))
    with image.open("r+b") as file:
        for block in blocks:
            file.seek(int(block) * size)
            file.write(b"\xff" * size)
    return image


def test_damage(two_roots: tuple[Path, Reader]) -> None:
    here, guest = two_roots
    with pytest.raises(BadSource, match="it is damaged") as caught:
        copied(guest, 7, here / "7")
    assert "EXT4-fs error (device vda7)" in caught.value.message


def test_damage_that_makes_a_kernel_panic(host: Runtime, tmp_path: Path) -> None:
    image = damaged(make_tree(tmp_path / "tree"), "panic")
    vmdk = tmp_path / "disk.vmdk"
    subprocess.run(["qemu-img", "convert", "-O", "vmdk", image, vmdk], check=True)
    with pytest.raises(BadSource, match="the reader guest failed") as caught:
        unpack(host, str(vmdk), tmp_path / "work")
    assert "EXT4-fs error (device vda)" in caught.value.message
    assert "panic" in caught.value.message


def test_killed_it_leaves_no_guest(host: Runtime, tmp_path: Path) -> None:
    image, into = file_system(make_tree(tmp_path / "tree"), "ext4"), tmp_path / "work/into"
    into.mkdir(parents=True)
    code = """if True:
        import sys
        from pathlib import Path
        from onecopy.images.source import open_source

        open_source(f"disk:{sys.argv[1]}").unpack(Path(sys.argv[2]), lambda _: None)
    """
    with subprocess.Popen([sys.executable, "-c", code, str(image), str(into)]) as process:
        _until(lambda: bool(_children(process.pid)))
        (guest,) = _children(process.pid)
        pidfd = os.pidfd_open(guest)
        process.kill()
    try:
        _until(lambda: not _children(1, guest) and not Path(f"/proc/{guest}").exists())
    finally:
        os.close(pidfd)


def _children(parent: int, only: int = 0) -> list[int]:
    """QEMUs that a process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        name, _, rest = text.partition("(")[2].rpartition(")")
        pid = int(path.parent.name)
        if (
            name.startswith("qemu-system")
            and int(rest.split()[1]) == parent
            and rest.split()[0] != "Z"
        ):
            found += [pid] if only in (0, pid) else []
    return found


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
