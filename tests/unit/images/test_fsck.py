"""verify: file systems that are damaged though their digest is right, and all of a store."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from onecopy import cli
from onecopy.errors import StoreDamaged
from onecopy.images.fsck import check_images, file_system
from onecopy.model import MIB, Reference
from onecopy.store import Artifact, NewLayer, Store
from tests.unit.store_kit import put

Damage = Callable[[Path], None]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("ONECOPY_HOME", str(tmp_path / "store"))
    return Store()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """erofs, ext2 and ext4 of the same folder."""
    folder = tmp_path_factory.mktemp("images")
    source = folder / "source"
    (source / "folder").mkdir(parents=True)
    for number in range(50):
        (source / f"folder/file-{number}").write_bytes(os.urandom(5000))
    _run("mkfs.erofs", str(folder / "erofs"), str(source))
    for fs in ("ext2", "ext4"):
        _run("mke2fs", "-q", "-t", fs, "-d", str(source), str(folder / fs), "8M")
    return folder


def _run(*argv: str) -> None:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    subprocess.run(argv, check=True, capture_output=True, env={**os.environ, "PATH": path})


def stored(store: Store, images: Path, fs: str, damage: Damage | None = None) -> Artifact:
    with store.workspace() as work:
        image = work / "image"
        shutil.copy(images / fs, image)
        if damage:
            damage(image)
        layer = NewLayer(image, f"application/vnd.onecopy.image.v1+{fs}")
        return store.put("segment", Reference(fs), b"{}", [layer])


def overwrite(offset: int, size: int) -> Damage:
    def damage(image: Path) -> None:
        with image.open("r+b") as file:
            file.seek(offset)
            file.write(b"\xa5" * size)

    return damage


def lose_a_folder(image: Path) -> None:
    _run("debugfs", "-w", "-R", "clri folder", str(image))


def wrong_superblock(image: Path) -> None:
    overwrite(1024 + 4, 4)(image)


def wrong_inodes(image: Path) -> None:
    """All behind the superblock: the root's inode is no inode."""
    overwrite(1024 + 128, image.stat().st_size - 1024 - 128)(image)


@pytest.mark.parametrize("fs", ["erofs", "ext2", "ext4"])
def test_a_sound_image(store: Store, images: Path, fs: str) -> None:
    artifact = stored(store, images, fs)
    assert check_images(artifact) == [fs]
    store.verify(artifact)


@pytest.mark.parametrize(
    ("fs", "damage", "said"),
    [
        ("erofs", wrong_superblock, "checksum"),
        ("erofs", wrong_inodes, "erofs"),
        ("ext2", lose_a_folder, "deleted/unused inode"),
        ("ext4", lose_a_folder, "deleted/unused inode"),
        ("ext4", overwrite(1024, 1024), "magic number"),
    ],
)
def test_a_damaged_image_with_a_right_digest(
    store: Store, images: Path, fs: str, damage: Damage, said: str
) -> None:
    artifact = stored(store, images, fs, damage)
    before = artifact.layers[0].path.read_bytes()
    store.verify(artifact)
    with pytest.raises(StoreDamaged, match=f"the {fs} file system of {fs}:latest in ") as caught:
        check_images(artifact)
    assert said in caught.value.message.lower()
    assert f"onecopy rm {fs}:latest" in caught.value.hint
    assert artifact.layers[0].path.read_bytes() == before


def test_what_has_no_file_system_is_not_checked(store: Store) -> None:
    assert check_images(put(store)) == []
    with store.workspace() as work:
        (work / "raw").write_bytes(bytes(MIB))
        layers = [NewLayer(work / "raw", "application/vnd.onecopy.image.v1+raw")]
        artifact = store.put("segment", Reference("raw"), b"{}", layers)
    assert file_system(artifact.layers[0]) == "raw"
    assert check_images(artifact) == []


def test_all(store: Store, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--all"]) == 0
    stored(store, images, "erofs")
    stored(store, images, "ext2", lose_a_folder)
    put(store, "app:1")
    changed = put(store, "changed:1", b"other").layers[0].path
    changed.chmod(0o600)
    changed.write_bytes(b"0ther")
    capsys.readouterr()
    assert cli.main(["verify", "--all"]) == StoreDamaged.exit_code
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "app:1 is whole",
        "erofs:latest is whole, its file systems are sound: erofs",
    ]
    assert f"{changed} does not match its digest" in err
    assert "the ext2 file system of ext2:latest" in err


@pytest.mark.parametrize("line", ["verify", "verify --all app:1"])
def test_names_or_all(store: Store, line: str) -> None:
    assert cli.main(line.split()) == 2
