"""Disk images as a source: every kind of table and file system, and what is refused.

Real images, made by the programs that users make theirs with. Not here: guests that run from one
(vm/test_images.py).
"""

import hashlib
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from onecopy.build.image import make_image
from onecopy.build.source import open_source
from onecopy.build.tree import walk
from onecopy.errors import BadSource
from onecopy.model import MIB
from tests.conftest import cannot_run

#: File system -> the least size (MiB) that it takes, and what makes it.
MAKERS = {
    "ext2": (8, "mke2fs -q -t ext2 -I 256"),
    "ext3": (16, "mke2fs -q -t ext3 -I 256"),
    "ext4": (16, "mke2fs -q -t ext4 -I 256"),
    "xfs": (320, "mkfs.xfs -q"),
    "btrfs": (128, "mkfs.btrfs -q"),
}
#: Runs with mounts of its own.
OWN_MOUNTS = ("unshare", "--mount", "--propagation=private", "sh", "-ec")
GPT = "label: gpt\nsize=1M, type=U\nsize={size}M, type=L\nsize=2M, type=S\n"
MBR = "label: dos\nsize=1M, type=c\ntype=5\nsize={size}M, type=L\n"


@pytest.fixture(autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        cannot_run("disk images are mounted by root")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small root: an owner, a link, a hole, an attribute."""
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "usr/lib").mkdir(parents=True)
    (tree / "usr/lib/os-release").write_text("ID=test\n")
    (tree / "etc/os-release").symlink_to("../usr/lib/os-release")
    (tree / "etc/shadow").write_text("x" * 9000)
    os.chown(tree / "etc/shadow", 0, 42)
    (tree / "etc/shadow").chmod(0o640)
    (tree / "hole").touch()
    os.truncate(tree / "hole", 3 << 20)
    os.setxattr(tree / "etc/shadow", "user.mine", b"1")
    for path in (tree, *tree.rglob("*")):
        os.utime(path, (1_600_000_000, 1_600_000_000), follow_symlinks=False)
    return tree


def file_system(tree: Path, fs: str) -> Path:
    """The image of a file system with ``tree`` in it."""
    size, maker = MAKERS[fs]
    image = tree.with_name(fs)
    with image.open("wb") as file:
        file.truncate(size * MIB)
    script = f"{maker} $1 && mkdir -p $1.m && mount -o loop $1 $1.m && cp -a $0/. $1.m"
    subprocess.run([*OWN_MOUNTS, script, str(tree), str(image)], check=True, capture_output=True)
    return image


def disk(table: str, number: int, content: Path) -> Path:
    """A disk with ``content`` as its partition ``number``."""
    image = content.with_name(f"disk-{content.name}")
    size = content.stat().st_size
    with image.open("wb") as file:
        file.truncate(size + 8 * MIB)
    text = table.format(size=size // MIB)
    subprocess.run(["sfdisk", "-q", image], input=text, text=True, check=True)
    argv = ["partx", "-g", "-r", "-o", "START", "-n", str(number), str(image)]
    start = int(subprocess.run(argv, check=True, capture_output=True).stdout)
    copy = ["dd", f"if={content}", f"of={image}", f"seek={start}", "bs=512"]
    subprocess.run([*copy, "conv=notrunc,sparse", "status=none"], check=True)
    return image


def unpack(source: str, tmp_path: Path) -> Path:
    work = tmp_path / "work"
    (work / "tree").mkdir(parents=True)
    try:
        return open_source(f"disk:{source}").unpack(work / "tree", lambda _: None)
    finally:
        assert [path.name for path in work.iterdir() if path.name != "mount"] == ["tree"]
        assert str(tmp_path) not in _loops()


def facts(tree: Path) -> dict[str, tuple[object, ...]]:
    """All of a tree that must come through, but the size of folders."""
    found: dict[str, tuple[object, ...]] = {}
    for path, status in walk(tree):
        link = path.readlink() if path.is_symlink() else None
        content = path.read_bytes() if path.is_file() and not link else None
        names = os.listxattr(path, follow_symlinks=False)
        mine = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns)
        found[str(path.relative_to(tree))] = (*mine, link, content, names)
    found.pop("lost+found", None)
    return found


def refused(source: str, tmp_path: Path) -> BadSource:
    with pytest.raises(BadSource) as caught:
        unpack(source, tmp_path)
    assert caught.value.hint
    assert "cannot be a source" in caught.value.message
    return caught.value


@pytest.mark.parametrize("fs", ["ext2", "ext3", "ext4", "xfs", "btrfs"])
def test_a_file_system_without_partitions(tree: Path, tmp_path: Path, fs: str) -> None:
    image = file_system(tree, fs)
    before = hashlib.sha256(image.read_bytes()).digest()
    assert facts(unpack(str(image), tmp_path)) == facts(tree)
    assert hashlib.sha256(image.read_bytes()).digest() == before


@pytest.mark.parametrize(("table", "number"), [(GPT, 2), (MBR, 5)])
@pytest.mark.parametrize("form", ["raw", "qcow2", "vmdk"])
def test_the_partition_that_is_a_root(
    tree: Path, tmp_path: Path, table: str, number: int, form: str
) -> None:
    image = disk(table, number, file_system(tree, "ext4"))
    other = image.with_suffix(f".{form}")
    subprocess.run(["qemu-img", "convert", "-O", form, image, other], check=True)
    assert facts(unpack(str(other), tmp_path)) == facts(tree)


def test_the_same_disk_gives_the_same_image(tree: Path, tmp_path: Path) -> None:
    image = disk(GPT, 2, file_system(tree, "ext4"))
    copy = image.with_suffix(".qcow2")
    subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", image, copy], check=True)
    digests = set()
    for number, source in enumerate((f"{image}", f"{copy}#2")):
        where = tmp_path / str(number)
        make_image(unpack(source, where), where / "image", "erofs")
        digests.add(hashlib.sha256((where / "image").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_partition_that_is_no_root_can_be_named(tree: Path, tmp_path: Path) -> None:
    (tree / "etc/os-release").unlink()
    (tree / "usr/lib/os-release").unlink()
    image = disk(GPT, 2, file_system(tree, "ext4"))
    said = refused(str(image), tmp_path / "1").message
    assert "#2 (16.0 MiB): ext4, not a root" in said
    assert "#3 (2.0 MiB): no file system" in said
    assert facts(unpack(f"{image}#2", tmp_path / "2")) == facts(tree)
    assert "partition 7 is not there" in refused(f"{image}#7", tmp_path / "3").message


def test_a_root_in_a_subvolume(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "top/@").mkdir(parents=True)
    (tmp_path / "top/@home").mkdir()
    subprocess.run(["cp", "-a", f"{tree}/.", tmp_path / "top/@"], check=True)
    image = file_system(tmp_path / "top", "btrfs")
    assert facts(unpack(str(image), tmp_path)) == facts(tree)


def test_a_subvolume_that_is_a_link_to_the_host(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    (tmp_path / "top/@").symlink_to("/")
    image = file_system(tmp_path / "top", "btrfs")
    assert "holds no root" in refused(str(image), tmp_path).message


def test_two_roots(tree: Path, tmp_path: Path) -> None:
    one = file_system(tree, "ext4")
    image = disk("label: gpt\nsize={size}M\nsize=16M\n", 1, one)
    os.truncate(image, 40 * MIB)
    table = "label: gpt\nsize=16M\nsize=16M\n"
    subprocess.run(["sfdisk", "-q", image], input=table, text=True, check=True)
    for start in (2048, 2048 + 16 * 2048):
        copy = ["dd", f"if={one}", f"of={image}", f"seek={start}", "bs=512", "conv=notrunc"]
        subprocess.run([*copy, "status=none"], check=True)
    error = refused(str(image), tmp_path / "1")
    assert "several of its partitions hold a root" in error.message
    assert "disk:FILE#NUMBER" in error.hint
    assert facts(unpack(f"{image}#2", tmp_path / "2")) == facts(tree)


def test_a_journal_with_something_in_it(tree: Path, tmp_path: Path) -> None:
    """As a crashed machine leaves it: it is neither replayed nor in the way."""
    image = file_system(tree, "ext4")
    script = "mount -o loop $0 $0.m && touch $0.m/new && sync && cat $0 >$0.dirty"
    subprocess.run([*OWN_MOUNTS, script, image], check=True)
    dirty = Path(f"{image}.dirty")
    head = dirty.read_bytes()[:2048]
    assert struct.unpack_from("<I", head, 1024 + 0x60)[0] & 4, "the journal needs no recovery"
    before = hashlib.sha256(dirty.read_bytes()).digest()
    assert {"etc/shadow", "hole"} <= set(facts(unpack(str(dirty), tmp_path)))
    assert hashlib.sha256(dirty.read_bytes()).digest() == before


def _luks(path: Path) -> None:
    path.write_bytes(b"LUKS\xba\xbe\x00\x02" + bytes(4 * MIB - 8))


def _lvm(path: Path) -> None:
    # As lib/format_text/layout.h and lib/label/label.h of LVM2 have it.
    rest = (struct.pack("<I8s", 32, b"LVM2 001") + b"x" * 32).ljust(492, b"\0")
    crc = zlib.crc32(rest, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    label = b"LABELONE" + struct.pack("<QI", 1, crc) + rest
    path.write_bytes(bytes(512) + label + bytes(4 * MIB - 1024))


def _swap(path: Path) -> None:
    path.write_bytes(bytes(4 * MIB))
    subprocess.run(["mkswap", "-q", path], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("make", "said", "hint"),
    [
        (lambda path: path.write_bytes(os.urandom(MIB)), "neither a file system", "disk image"),
        (lambda path: path.touch(), "neither a file system", "disk image"),
        (_luks, "encrypted", "cryptsetup"),
        (_lvm, "LVM", "vgchange"),
        (_swap, "swap", "#NUMBER"),
    ],
)
def test_what_holds_no_files(
    tmp_path: Path, make: Callable[[Path], None], said: str, hint: str
) -> None:
    make(tmp_path / "image")
    error = refused(str(tmp_path / "image"), tmp_path)
    assert said in error.message
    assert hint in error.hint


def test_what_was_cut_off(tree: Path, tmp_path: Path) -> None:
    plain = file_system(tree, "ext4")
    for number, (image, keep, said) in enumerate(
        (
            (disk(GPT, 2, plain), 8 * MIB, "truncated"),
            (disk(MBR, 5, plain), 8 * MIB, "truncated"),
            (plain, 8 * MIB, "does not mount"),
        )
    ):
        os.truncate(image, keep)
        error = refused(str(image), tmp_path / str(number))
        assert said in error.message
        assert "truncated or damaged" in error.hint
    other = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", file_system(tree, "ext2"), other])
    os.truncate(other, other.stat().st_size // 2)
    error = refused(str(other), tmp_path / "qcow2")
    assert "exceeding the end of the file" in error.message
    assert "truncated or damaged" in error.hint


def test_an_image_that_leads_to_other_files(tree: Path, tmp_path: Path) -> None:
    plain = file_system(tree, "ext4")
    over, apart = tmp_path / "over.qcow2", tmp_path / "apart.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    subprocess.run([*create, "-b", plain, "-F", "raw", over], check=True)
    subprocess.run([*create, "-o", f"data_file={tmp_path}/data", apart, "4M"], check=True)
    for number, image in enumerate((over, apart)):
        error = refused(str(image), tmp_path / str(number))
        assert "must be one file" in error.message
        assert "convert" in error.hint


def test_names_that_are_no_images(tmp_path: Path) -> None:
    for name, said in (
        ("missing", "No such file"),
        ("missing#1", "No such file"),
        (".", "directory"),
    ):
        with pytest.raises(BadSource, match=said) as caught:
            open_source(f"disk:{tmp_path}/{name}")
        assert caught.value.hint


def test_a_name_with_a_number_sign(tree: Path, tmp_path: Path) -> None:
    image = file_system(tree, "ext4").rename(tmp_path / "my#image")
    assert facts(unpack(str(image), tmp_path)) == facts(tree)


def test_killed_it_leaves_no_mount(tree: Path, tmp_path: Path) -> None:
    for number in range(12):
        (tree / f"large{number}").write_bytes(os.urandom(MIB))
    image, into = file_system(tree, "ext4"), tmp_path / "into"
    into.mkdir()
    code = """if True:
        import sys
        from pathlib import Path
        from onecopy.build.source import open_source

        open_source(f"disk:{sys.argv[1]}").unpack(Path(sys.argv[2]), lambda _: None)
    """
    with subprocess.Popen([sys.executable, "-c", code, str(image), str(into)]) as process:
        _until(lambda: any(into.iterdir()))
        process.kill()
    _until(lambda: str(image) not in _loops())


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _loops() -> str:
    return subprocess.run(["losetup", "--all"], capture_output=True, text=True).stdout


def test_a_disk_that_does_not_fit(tree: Path, tmp_path: Path) -> None:
    (tree / "large").write_bytes(os.urandom(3 * MIB))
    image = file_system(tree, "ext4")
    (tmp_path / "small").mkdir()
    code = """if True:
        import sys
        from onecopy.build.source import open_source
        from onecopy.errors import NotEnough
        from pathlib import Path

        into = Path("small/tree")
        into.mkdir()
        try:
            open_source(f"disk:{sys.argv[1]}").unpack(into, lambda _: None)
        except NotEnough as error:
            print(error.what, [str(path) for path in Path("small").iterdir()])
    """
    script = 'mount -t tmpfs -o size=1M small small && exec $0 -c "$1" $2'
    argv = [*OWN_MOUNTS, script, sys.executable, code, str(image)]
    said = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path).stdout
    assert said.startswith("disk "), said
