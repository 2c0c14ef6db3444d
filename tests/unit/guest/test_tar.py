"""Archives of files and folders: there and back, and what a guest might send to do harm."""

import contextlib
import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecopy.errors import InsufficientResources, TooLarge
from onecopy.guest.transfer.tar import Limits, Unpacker, Unusable, pack


def archive(*members: tuple[str, bytes, str | bytes]) -> bytes:
    """A tar of (name, type, link target or content) members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.mode = 0o755
            if isinstance(content, str):
                info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def unpack(target: Path, data: bytes, step: int = 1 << 16) -> None:
    unpacker = Unpacker(target)
    for start in range(0, len(data), step):
        unpacker.feed(data[start : start + step])
    unpacker.finish()


ROOT = (".", tarfile.DIRTYPE, "")


@pytest.mark.parametrize("step", [1, 100, 511, 512, 513, 1 << 20])
def test_it_comes_in_any_pieces(tmp_path: Path, step: int) -> None:
    source = tmp_path / "source"
    (source / "a b").mkdir(parents=True)
    (source / "a b" / ("n" * 255)).write_bytes(b"x" * 700)
    (source / "empty").touch(0o640)
    (source / "link").symlink_to("a b/" + "n" * 255)
    unpack(tmp_path / "copy", b"".join(pack(source, ".")), step)
    assert (tmp_path / "copy/link").read_bytes() == b"x" * 700
    assert (tmp_path / "copy/empty").stat().st_mode == 0o100640
    assert sorted(os.listdir(tmp_path / "copy")) == ["a b", "empty", "link"]  # noqa: PTH208


@given(st.binary(max_size=3000), st.integers(1, 2000))
def test_a_file_is_what_it_was(content: bytes, step: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        source.write_bytes(content)
        unpack(target, b"".join(pack(source, "content")), step)
        assert target.read_bytes() == content


def test_tar_reads_what_is_packed(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/one").write_bytes(b"1")
    (tmp_path / "source/two").hardlink_to(tmp_path / "source/one")
    data = io.BytesIO(b"".join(pack(tmp_path / "source", ".")))
    with tarfile.open(fileobj=data) as tar:
        found = {each.name: (each.type, each.linkname, each.uid, each.uname) for each in tar}
    assert found == {
        ".": (tarfile.DIRTYPE, "", 0, ""),
        "./one": (tarfile.REGTYPE, "", 0, ""),
        "./two": (tarfile.LNKTYPE, "./one", 0, ""),
    }


def test_what_cannot_be_packed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"neither .*pipe"):
        list(pack(tmp_path, "."))
    (tmp_path / "pipe").unlink()
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    pieces = pack(tmp_path / "file", "content")
    next(pieces)
    os.truncate(tmp_path / "file", 10)
    with pytest.raises(OSError, match="was truncated"):
        list(pieces)


HARMFUL: list[tuple[str, Iterable[tuple[str, bytes, str | bytes]]]] = [
    ("points outside", [ROOT, ("../out", tarfile.REGTYPE, b"x")]),
    ("points outside", [ROOT, ("a/../../out", tarfile.REGTYPE, b"x")]),
    ("points outside", [ROOT, ("/tmp/out", tarfile.REGTYPE, b"x")]),
    ("points outside", [ROOT, ("l", tarfile.SYMTYPE, "/etc/passwd")]),
    ("points outside", [ROOT, ("l", tarfile.SYMTYPE, "../secret")]),
    (
        "comes before its directory",
        [ROOT, ("l", tarfile.SYMTYPE, ".."), ("l/out", tarfile.REGTYPE, b"x")],
    ),
    (
        "comes before its directory",
        [ROOT, ("l", tarfile.SYMTYPE, "."), ("l/in", tarfile.REGTYPE, b"x")],
    ),
    # In words it stays inside, and on disk it does not.
    (
        "points outside",
        [
            ROOT,
            ("a", tarfile.DIRTYPE, ""),
            ("a/b", tarfile.SYMTYPE, ".."),
            ("l", tarfile.SYMTYPE, "a/b/../x"),
        ],
    ),
    ("points outside", [ROOT, ("h", tarfile.LNKTYPE, "../secret")]),
    ("not in the archive", [ROOT, ("h", tarfile.LNKTYPE, "nothing")]),
    (
        "not in the archive",
        [ROOT, ("l", tarfile.SYMTYPE, "../secret"), ("h", tarfile.LNKTYPE, "l")],
    ),
    ("neither", [ROOT, ("d", tarfile.BLKTYPE, "")]),
    ("neither", [ROOT, ("p", tarfile.FIFOTYPE, "")]),
    ("comes before its directory", [("f", tarfile.REGTYPE, b"x"), ("g", tarfile.REGTYPE, b"x")]),
    ("too early", [("l", tarfile.SYMTYPE, "secret")]),
    ("too early", []),
]


@pytest.mark.parametrize(("why", "members"), HARMFUL)
def test_what_would_do_harm(
    tmp_path: Path, why: str, members: Iterable[tuple[str, bytes, str | bytes]]
) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "into").mkdir()
    with pytest.raises(Unusable, match=why):
        unpack(tmp_path / "into" / "copy", archive(*members))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["into", "secret"]
    assert [path.name for path in (tmp_path / "into").iterdir()] in ([], ["copy"])
    assert (tmp_path / "secret").stat().st_nlink == 1


def test_a_member_that_comes_twice(tmp_path: Path) -> None:
    for kind in (tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.SYMTYPE):
        data = archive(ROOT, ("a", tarfile.REGTYPE, b"x"), ("a", kind, "x"))
        with pytest.raises(FileExistsError):
            unpack(tmp_path / kind.hex(), data)


def test_set_id_bits_and_foreign_owners_do_not_come(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("f")
        info.mode, info.uid, info.gid, info.mtime = 0o6755, 1234, 1234, 1 << 62
        tar.addfile(info)
    unpack(tmp_path / "f", file.getvalue())
    stat = (tmp_path / "f").stat()
    assert (stat.st_mode, stat.st_uid) == (0o100755, os.geteuid())


@pytest.mark.parametrize(
    "data",
    [
        b"not a tar " * 100,
        archive(ROOT)[:700],
        archive(("f", tarfile.REGTYPE, b"x" * 2000))[:1500],
        archive(("n" * 5000, tarfile.REGTYPE, b"")),
    ],
)
def test_what_is_no_archive(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(Unusable):
        unpack(tmp_path / "copy", data)


def test_deep_folders_are_packed_without_recursion(tmp_path: Path) -> None:
    depth, fd = 1500, os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    try:
        packed = sum(1 for piece in pack(tmp_path / "d", ".") if any(piece))
    finally:
        # Python's own would recurse, and so would pytest's.
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)
    assert packed == depth


def test_deep_folders_are_not_made(tmp_path: Path) -> None:
    def members(depth: int) -> list[tuple[str, bytes, str | bytes]]:
        return [(f"./{'d/' * n}", tarfile.DIRTYPE, "") for n in range(depth)]

    unpack(tmp_path / "some", archive(*members(200)))
    with pytest.raises(Unusable, match="deeper than 256"):
        unpack(tmp_path / "many", archive(*members(1500)))
    # What is left can be removed as all else is.
    shutil.rmtree(tmp_path / "many")


def test_limits(tmp_path: Path) -> None:
    data = archive(ROOT, ("./a", tarfile.REGTYPE, bytes(5000)), ("./b", tarfile.REGTYPE, b""))

    def fed(name: str, limits: Limits) -> None:
        unpacker = Unpacker(tmp_path / name, limits)
        unpacker.feed(data)
        unpacker.finish()

    fed("enough", Limits(len(data), 3))
    with pytest.raises(TooLarge, match="it exceeds"):
        fed("size", Limits(len(data) - 1, 3))
    with pytest.raises(TooLarge, match="more than 2 files"):
        fed("files", Limits(len(data), 2))
    # What comes after the end counts, too.
    unpacker = Unpacker(tmp_path / "after", Limits(len(data), 3))
    unpacker.feed(data)
    with pytest.raises(TooLarge):
        unpacker.feed(b"x")


def test_a_disk_that_is_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.statvfs_result((4096, 4096, 1 << 30, 1000, 1000, 1000, 1000, 1000, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with pytest.raises(InsufficientResources, match="disk space beyond the reserve"):
        Unpacker(tmp_path / "target").feed(bytes(512))


@given(st.binary(max_size=512), st.sampled_from(b"05xgLKS"), st.integers(0, 511))
def test_any_header_is_a_member_or_refused(noise: bytes, kind: int, at: int) -> None:
    import tempfile

    header = bytearray(archive(ROOT)[:512])
    header[at : at + len(noise)] = noise[: 512 - at]
    header[156] = kind
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    refused = contextlib.suppress(Unusable, TooLarge, OSError)
    with tempfile.TemporaryDirectory() as folder, refused:
        unpack(Path(folder) / "target", bytes(header) + bytes(4096))
