"""Real trees -> real images, mounted and compared with the tree, property by property.

Not here: what may not become an image (test_source.py).
"""

import hashlib
import os
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from onecopy.errors import BadSource, InsufficientResources, InvalidInput
from onecopy.images.free_space import disk_space
from onecopy.images.fs_image import FILE_SYSTEMS, make_image
from onecopy.images.source import open_source
from onecopy.images.tree import scan
from onecopy.model import HUGE_PAGE_SIZE
from tests.conftest import cannot_run

NEWEST = 1_614_834_367
OLDEST_NS = 1_580_608_922_123_456_789
# struct vfs_cap_data of cap_net_raw+ep.
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
# Version 2; user::rw- user:77:r-- group::r-- mask::r-- other::r--.
ACL = bytes.fromhex(
    "02000000 01000600ffffffff 020004004d000000 04000400ffffffff 10000400ffffffff 20000400ffffffff"
)
LONG_NAME = "n" * 255


@pytest.fixture(autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        cannot_run("mounting and owners need root")


def make_tree(root: Path, *, names: Sequence[str]) -> Path:
    """A tree with all that a file system can hold; ``names`` says in which order to make some."""
    (root / "d/e").mkdir(parents=True)
    (root / "many").mkdir()
    for name in names:
        (root / "many" / name).write_text(name)
    (root / "d/a").write_text("hello")
    (root / "hard").hardlink_to(root / "d/a")
    (root / "d/e/link").symlink_to("../a")
    (root / "outside").symlink_to("/nowhere/at/all")
    (root / "long link").symlink_to("x/" * 500)
    os.mknod(root / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(root / "block", 0o640 | stat.S_IFBLK, os.makedev(259, 300_000))
    os.mkfifo(root / "pipe")
    (root / "empty").touch()
    with (root / "sparse").open("wb") as file:
        file.seek(3 << 20)
        file.write(b"end")
    (root / "big").write_bytes(b"0123456789abcdef" * 100_000)
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe")).write_text("not UTF-8")
    (root / 'new\nline "q" \\ link to').write_text("quoted")
    deep = root / "/".join(f"deep{number}" + "x" * 40 for number in range(20))
    deep.mkdir(parents=True)
    (deep / "leaf").write_text("leaf")
    set_attributes(root)
    for path in [*root.rglob("*"), root]:
        os.utime(path, (NEWEST, NEWEST), follow_symlinks=False)
    os.utime(root / "d/a", ns=(OLDEST_NS, OLDEST_NS))
    return root


def set_attributes(root: Path) -> None:
    for name, mode in (("setuid", 0o6755), ("sticky", 0o1777), ("secret", 0)):
        (root / name).write_text(name)
        os.chown(root / name, 12, 70_000)
        (root / name).chmod(mode)
    os.chown(root / "outside", 5, 6, follow_symlinks=False)
    os.setxattr(root / "d/a", "user.note", b"\0binary")
    os.setxattr(root / "d/e", "trusted.note", b"t")
    (root / "capable").write_text("capable")
    os.setxattr(root / "capable", "security.capability", CAPABILITY)
    (root / "acl").write_text("acl")
    os.setxattr(root / "acl", "system.posix_acl_access", ACL)
    os.setxattr(root / "d", "system.posix_acl_default", ACL)
    os.setxattr(root, "user.root", b"r")
    os.chown(root, 3, 80_000)
    root.chmod(0o710)


def picture(tree: Path, *, seconds: bool) -> dict[bytes, tuple[object, ...]]:
    """All that an image must keep of ``tree``; ``seconds``: times in whole ones."""
    first_names: dict[int, bytes] = {}
    return {
        os.fsencode(path.relative_to(tree)): _properties(path, tree, first_names, seconds)
        for path in sorted([tree, *tree.rglob("*")])
    }


def _properties(
    path: Path, tree: Path, first_names: dict[int, bytes], seconds: bool
) -> tuple[object, ...]:
    status = path.lstat()
    is_folder = stat.S_ISDIR(status.st_mode)
    name = os.fsencode(path.relative_to(tree))
    content = ""
    if stat.S_ISREG(status.st_mode):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    elif stat.S_ISLNK(status.st_mode):
        content = os.fspath(path.readlink())
    return (
        oct(status.st_mode),
        status.st_uid,
        status.st_gid,
        status.st_rdev,
        0 if is_folder else status.st_size,
        0 if is_folder else status.st_nlink,
        name if is_folder else first_names.setdefault(status.st_ino, name),
        status.st_mtime_ns // (10**9 if seconds else 1),
        content,
        {
            key: os.getxattr(path, key, follow_symlinks=False)
            for key in sorted(os.listxattr(path, follow_symlinks=False))
        },
    )


@contextmanager
def mounted(image: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-o", "ro,loop", image, folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


NAMES = [f"file{number}" for number in range(300)]


@pytest.mark.parametrize("fs", FILE_SYSTEMS)
def test_an_image_keeps_everything(tmp_path: Path, fs: str) -> None:
    tree = make_tree(tmp_path / "tree", names=NAMES)
    image = tmp_path / "image"
    size = make_image(tree, image, fs)
    assert image.stat().st_size == size
    assert size % HUGE_PAGE_SIZE == 0
    with mounted(image) as folder:
        assert picture(folder, seconds=fs == "ext2") == picture(tree, seconds=fs == "ext2")
        if fs == "ext2":
            assert (folder / "sparse").stat().st_blocks * 512 <= 16384
    assert {path.name for path in tmp_path.iterdir()} == {"tree", "image"}


@pytest.mark.parametrize("fs", FILE_SYSTEMS)
@pytest.mark.parametrize(
    "compress", ["", "gzip", "bzip2", "xz", "zstd"], ids=lambda text: text or "plain"
)
def test_a_tar_keeps_everything(tmp_path: Path, fs: str, compress: str) -> None:
    tree = make_tree(tmp_path / "tree", names=NAMES[:10])
    archive = tmp_path / "a:b.tar"
    pack = ["tar", "--xattrs", "--xattrs-include=*", "--acls", "--format=posix", "-S"]
    pack += [f"--use-compress-program={compress}"] if compress else []
    pack += ["--force-local", "-C", os.fspath(tree), "-cf", os.fspath(archive), "."]
    subprocess.run(pack, check=True)
    into = tmp_path / "into"
    into.mkdir()
    unpacked = open_source(f"tar:{archive}").unpack(into, lambda _: None)
    assert picture(unpacked, seconds=False) == picture(tree, seconds=False)
    make_image(unpacked, tmp_path / "from tar", fs)
    make_image(tree, tmp_path / "from folder", fs)
    assert sha256(tmp_path / "from tar") == sha256(tmp_path / "from folder")


@pytest.mark.parametrize("fs", FILE_SYSTEMS)
def test_the_same_tree_gives_the_same_image(tmp_path: Path, fs: str) -> None:
    """Made a second later, in another order, in a file system that lists folders its own way."""
    make_image(make_tree(tmp_path / "tree", names=NAMES), tmp_path / "image", fs)
    time.sleep(1.1)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        again = make_tree(Path(memory) / "again", names=NAMES[::-1])
        make_image(again, tmp_path / "again", fs)
        assert sha256(tmp_path / "image") == sha256(tmp_path / "again")
        (again / "many/file7").write_text("FILE7")
        os.utime(again / "many/file7", (NEWEST, NEWEST))
        make_image(again, tmp_path / "other", fs)
        assert sha256(tmp_path / "other") != sha256(tmp_path / "again")


def test_a_tar_without_its_folders_gives_the_same_image(tmp_path: Path) -> None:
    """Folders that are no members are made by tar, at the time and with the umask of the build."""
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_text("c")
    os.utime(tmp_path / "a/b/c", (NEWEST, NEWEST))
    archive = tmp_path / "x.tar"
    subprocess.run(["tar", "-C", tmp_path, "-cf", archive, "a/b/c"], check=True)
    digests = set()
    for mask in (0o022, 0o077):
        into = tmp_path / f"into{mask}"
        into.mkdir(0o700)
        before = os.umask(mask)
        try:
            make_image(
                open_source(f"tar:{archive}").unpack(into, print), tmp_path / "image", "erofs"
            )
        finally:
            os.umask(before)
        digests.add(sha256(tmp_path / "image"))
        (tmp_path / "image").unlink()
        assert (into / "a/b").stat().st_mtime == NEWEST
        time.sleep(1.1)
    assert len(digests) == 1


@pytest.mark.parametrize("own", [False, True], ids=["ours", "the tree's"])
def test_ext2_is_sound(tmp_path: Path, own: bool) -> None:
    tree = make_tree(tmp_path / "tree", names=NAMES)
    if own:
        (tree / "lost+found").mkdir()
    make_image(tree, tmp_path / "image", "ext2")
    check = subprocess.run(["e2fsck", "-fn", tmp_path / "image"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr
    with mounted(tmp_path / "image") as folder:
        assert (folder / "lost+found").exists() == own
        for path in [folder, *folder.rglob("*")]:
            assert path.lstat().st_ctime == path.lstat().st_mtime == path.lstat().st_atime


@pytest.mark.parametrize(
    ("count", "size"), [(1, 150 << 20), (4000, 10), (3, 0)], ids=["big", "many", "empty"]
)
def test_ext2_fits_any_content(tmp_path: Path, count: int, size: int) -> None:
    (tmp_path / "tree").mkdir()
    for number in range(count):
        (tmp_path / "tree" / f"{number:0250}").write_bytes(b"\xaa" * size)
    bytes_made = make_image(tmp_path / "tree", tmp_path / "image", "ext2")
    with mounted(tmp_path / "image") as folder:
        assert sum(path.stat().st_size for path in folder.iterdir()) == count * size
    # Room for the content and its inodes, and not much more.
    assert bytes_made <= 1.05 * count * (-(-size // 4096) * 4096 + 600) + (4 << 20)


def test_names_of_255_bytes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / LONG_NAME).write_text("long")
    (tree / LONG_NAME[:254]).write_text("shorter")
    make_image(tree, tmp_path / "ext2", "ext2")
    made = [tmp_path / "ext2"]
    try:
        make_image(tree, tmp_path / "erofs", "erofs")
        made.append(tmp_path / "erofs")
    except BadSource as error:
        # erofs-utils 1.5 would cut them: a refusal is right, a wrong image is not.
        assert "255 bytes" in error.message
        assert "ext2" in error.hint
    for image in made:
        with mounted(image) as folder:
            assert (folder / LONG_NAME).read_text() == "long"
            assert (folder / LONG_NAME[:254]).read_text() == "shorter"


@pytest.mark.parametrize("fs", FILE_SYSTEMS)
def test_a_full_disk_is_seen_before(tmp_path: Path, fs: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "big").write_bytes(bytes(8 << 20))
    with small_disk(tmp_path) as disk:
        with pytest.raises(InsufficientResources) as caught:
            make_image(tree, disk / "image", fs)
        assert caught.value.what == "disk"
        assert caught.value.needed > 8 << 20 > caught.value.available
        assert not list(disk.iterdir())


@contextmanager
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "small", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("fs", FILE_SYSTEMS)
def test_a_disk_that_fills_up_meanwhile(tmp_path: Path, fs: str) -> None:
    """The makers themselves, without the check before, on a disk that is too small."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "big").write_bytes(b"x" * (8 << 20))
    with small_disk(tmp_path) as disk, pytest.raises(InsufficientResources), disk_space(disk, 0):
        FILE_SYSTEMS[fs](tree, disk / "image", scan(tree))


@pytest.mark.parametrize("fs", FILE_SYSTEMS)
def test_a_tree_that_changes_is_refused(tmp_path: Path, fs: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "sparse").touch()
    # Takes the programs a while to read.
    os.truncate(tree / "sparse", 200 << 20)
    changer = subprocess.Popen(["sh", "-c", f"while date +%N > '{tree}/changing'; do :; done"])
    try:
        while not (tree / "changing").exists():
            pass
        with pytest.raises(BadSource, match=r"changed while it was read|cannot read"):
            make_image(tree, tmp_path / "image", fs)
    finally:
        changer.kill()
        changer.wait()


def test_a_mount_inside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tree/proc").mkdir(parents=True)
    subprocess.run(["mount", "-t", "proc", "proc", tmp_path / "tree/proc"], check=True)
    try:
        with pytest.raises(BadSource, match="another file system"):
            make_image(tmp_path / "tree", tmp_path / "image", "erofs")
    finally:
        subprocess.run(["umount", tmp_path / "tree/proc"], check=True)


def test_an_unknown_file_system(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="squashfs"):
        make_image(tmp_path, tmp_path / "image", "squashfs")


def test_more_attributes_than_ext2_can_hold(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        tree = Path(memory)
        (tree / "file").touch()
        os.setxattr(tree / "file", "user.big", b"x" * 30_000)
        with pytest.raises(BadSource, match=r"user\.big"):
            make_image(tree, tmp_path / "image", "ext2")
