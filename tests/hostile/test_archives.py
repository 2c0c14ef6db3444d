"""Archives and trees that lie: each is kept whole, or refused by name, and nothing is left.

Real builds into a real store; what makes the images really runs. Not here: ordinary archives
(unit/test_build_image.py).
"""

from __future__ import annotations

import base64
import bz2
import gzip
import lzma
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onecopy.errors import BadSource, InsufficientResources, OnecopyError
from onecopy.images.build import BuildOptions, build_segment
from onecopy.images.fs_image import make_image
from onecopy.images.kernel import ensure_kernel
from onecopy.images.source import open_source
from onecopy.linux.removal import remove_tree
from onecopy.model import Reference
from onecopy.store import Store
from tests.conftest import cannot_run
from tests.hostile import tar_kit as tar
from tests.unit.deep_tree import nest

REF = Reference.parse("hostile:1")
GOOD = tar.file(b"good", b"data")
MIB = 1 << 20
ACL = b"user::rw-\nuser:77:r--\ngroup::r--\nmask::r--\nother::r--\n"


@pytest.fixture(autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        cannot_run("archives are unpacked by root only")


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def unpack(path: Path, into: Path, data: bytes) -> tuple[Path, list[str]]:
    path.write_bytes(data)
    source = open_source(f"tar:{path}")
    return source.unpack(into, lambda _: None), list(source.left_out)


#: What is wrong -> the archive, and what the error says (the member's name first).
REFUSED: dict[str, tuple[bytes, str]] = {
    "cut at a member": (GOOD + GOOD, "without its end mark"),
    "cut in a member": ((GOOD + tar.file(b"long", b"x" * 9000) + tar.END)[:4000], "long"),
    "cut in a header": (GOOD + tar.header(b"x")[:300], "without its end mark"),
    "two archives": (GOOD + tar.END + GOOD + tar.END, "a second archive"),
    "rubbish behind": (GOOD + tar.END + b"x", "data after its end"),
    "rubbish between": (GOOD + b"x" * 512 + GOOD + tar.END, "header of the next member is invalid"),
    "a kind of nobody's": (tar.header(b"odd", b"Z") + tar.END, "'odd'.*type"),
    "another volume": (tar.header(b"odd", b"M") + tar.END, "'odd'.*type"),
    "a negative size": (tar.header(b"neg", size=b"\xff" * 12) + tar.END, "'neg'.*size is -1"),
    "a huge size": (tar.header(b"huge", size=b"\x80" + b"\x7f" * 11) + tar.END, "too large"),
    "no number": (tar.header(b"non", mode=b"rwxr-xr") + tar.END, "'non'.*number"),
    "an owner of nobody": (
        tar.header(b"who", uid=b"\x80\0\0\0\xff\xff\xff\xff") + tar.END,
        "'who'.*owner .* out of range",
    ),
    "a device of nobody": (
        tar.header(b"dev", b"3", devices=(b"0077777", b"0")) + tar.END,
        "'dev'.*out of Linux",
    ),
    "before 1970": (tar.pax((b"mtime", b"-5")) + GOOD + tar.END, "'good'.*-5 s"),
    "before 1970, in base 256": (
        tar.header(b"old", mtime=b"\xff" * 11 + b"\xfb") + tar.END,
        "'old'.*-5 s",
    ),
    "after all times": (tar.pax((b"mtime", b"1" + b"0" * 18)) + GOOD + tar.END, "'good'.*time"),
    "no time": (tar.pax((b"mtime", b"nan")) + GOOD + tar.END, "'good'.*time"),
    "an unknown attribute": (
        tar.pax((b"SCHILY.xattr.system.nfs4_acl", b"x")) + GOOD + tar.END,
        "'good'.*nfs4_acl",
    ),
    "an attribute in no form": (
        tar.pax((b"VENDOR.xattr.user.a", b"x")) + GOOD + tar.END,
        "'good'.*VENDOR",
    ),
    "an attribute that is no base64": (
        tar.pax((b"LIBARCHIVE.xattr.user.a", b"!!!")) + GOOD + tar.END,
        "'good'.*user.a.*malformed",
    ),
    "two values": (
        tar.pax((b"LIBARCHIVE.xattr.user.a", b"eA"), (b"SCHILY.xattr.user.a", b"y"))
        + GOOD
        + tar.END,
        "'good'.*two values",
    ),
    "an attribute of a link": (
        tar.pax((b"SCHILY.xattr.user.a", b"x")) + tar.header(b"link", b"2", target=b"x") + tar.END,
        "'link'.*cannot be stored",
    ),
    "an ACL of names": (
        tar.pax((b"SCHILY.acl.access", ACL.replace(b"77", b"lisa"))) + GOOD + tar.END,
        "'good'.*lisa.*numeric-owner",
    ),
    "an ACL that is none": (
        tar.pax((b"SCHILY.acl.access", b"\xff\0" * 99)) + GOOD + tar.END,
        "'good'.*ACL",
    ),
    "a broken header": (
        tar.header(b"p", b"x", size=9) + tar.filled(b"99 a=b\n??") + GOOD,
        "malformed",
    ),
    "a large header": (tar.header(b"p", b"x", size=1 << 32) + tar.END, "has 4294967296 bytes"),
    "headers for nobody": (tar.pax((b"path", b"x")) + tar.END, "without its member"),
    "only headers": (tar.pax((b"a", b"b")) * 100_000 + tar.END, "in a row"),
    "a zero in a name": (tar.pax((b"path", b"a\0b")) + GOOD + tar.END, "zero byte"),
    "a zero in a long name": (tar.long_name(b"a\0b" * 50) + GOOD + tar.END, "zero byte"),
    "a zero in an attribute": (
        tar.pax((b"LIBARCHIVE.xattr.user.a%00b", b"YQ==")) + GOOD + tar.END,
        "zero byte",
    ),
    "too deep": (b"".join(tar.nested(1500)) + tar.END, "501 levels"),
    "too long": (tar.long_name(b"x/" * 100 + b"y" * 3500) + GOOD + tar.END, "3700 bytes"),
    "a name too long": (tar.long_name(b"y" * 256) + GOOD + tar.END, "name too long"),
    "out by a name": (tar.file(b"a/../../x") + tar.END, "points outside"),
    "out by a hard link": (tar.header(b"h", b"1", target=b"/etc/passwd") + tar.END, "'h'.*out"),
    "out by a link": (
        tar.header(b"l", b"2", target=b"/etc") + tar.file(b"l/new") + tar.END,
        "'l/new'.*points outside",
    ),
    "a hard link to nothing": (tar.header(b"h", b"1", target=b"no") + tar.END, "'h'.*No such"),
    "a hard link to a folder": (
        tar.header(b"d", b"5") + tar.header(b"h", b"1", target=b"d") + tar.END,
        "'h'.*not permitted",
    ),
    "a file as folder": (GOOD + tar.file(b"good/x") + tar.END, "'good/x'.*Not a directory"),
    "a full folder as file": (
        tar.file(b"d/x") + tar.file(b"d") + tar.END,
        "'d'.*not empty",
    ),
    "the root as file": (tar.file(b"./.") + tar.END, "the root must be a directory"),
    "a folder with content": (tar.file(b"d/", b"x") + tar.END, "'d/'.*bytes of data"),
    "no target": (tar.header(b"l", b"2") + tar.END, "'l'.*No such"),
    "a map that goes back": (
        tar.header(b"s", b"S", size=4, sparse=tar.sparse_entries((8, 2), (0, 2), real=99))
        + tar.filled(b"data")
        + tar.END,
        "'s'.*not in ascending order",
    ),
    "a map for more": (
        tar.header(b"s", b"S", size=4, sparse=tar.sparse_entries((0, 9), real=99))
        + tar.filled(b"data")
        + tar.END,
        "'s'.*does not match",
    ),
    "a map beyond": (
        tar.header(b"s", b"S", size=4, sparse=tar.sparse_entries((96, 4), real=99))
        + tar.filled(b"data")
        + tar.END,
        "'s'.*does not match",
    ),
    "a map without end": (
        tar.header(b"s", b"S", size=4, sparse=tar.sparse_entries((0, 4), real=99, more=True))
        + (b"%011o\0%011o\0" % (99, 0) * 21 + b"\1").ljust(512, b"\0") * 20_000,
        "'s'.*has more than",
    ),
    "a pax map that lies": (
        tar.pax((b"GNU.sparse.map", b"0,4,2,4"), (b"GNU.sparse.size", b"99")) + GOOD + tar.END,
        "'good'.*not in ascending order",
    ),
    "a pax map of halves": (
        tar.pax((b"GNU.sparse.map", b"0,4,8"), (b"GNU.sparse.size", b"99")) + GOOD + tar.END,
        "'good'.*incomplete",
    ),
    "a map in the data that lies": (
        tar.pax(
            (b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"9")
        )
        + tar.file(b"s", tar.filled(b"1\n0\n99\n") + b"data")
        + tar.END,
        "'s'.*does not match",
    ),
    "a map in the data without end": (
        tar.pax(
            (b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"9")
        )
        + tar.file(b"s", b"9" * 18 + b"\n" + b"0\n" * 3_000_000)
        + tar.END,
        "'s'.*has more than",
    ),
    "a map of tomorrow": (
        tar.pax((b"GNU.sparse.major", b"2"), (b"GNU.sparse.minor", b"0")) + GOOD + tar.END,
        "'good'.*an unknown format",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_archive_that_is_refused(tmp_path: Path, into: Path, what: str) -> None:
    data, said = REFUSED[what]
    with pytest.raises(BadSource, match=said) as caught:
        unpack(tmp_path / "x.tar", into, data)
    assert caught.value.hint
    assert len(caught.value.message) < 9000
    assert not list(into.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"into", "x.tar"}


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_archives_in_a_row(
    tmp_path: Path, into: Path, pack: Callable[[bytes], bytes]
) -> None:
    whole = GOOD + tar.END
    with pytest.raises(BadSource, match="a second archive"):
        unpack(tmp_path / "x", into, pack(whole) + pack(whole))
    # One archive in two pieces is one.
    unpack(tmp_path / "x", into, pack(whole[:600]) + pack(whole[600:]))
    assert (into / "good").read_bytes() == b"data"


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_rubbish_behind_what_is_compressed(
    tmp_path: Path, into: Path, pack: Callable[[bytes], bytes]
) -> None:
    with pytest.raises(BadSource, match="cannot unpack"):
        unpack(tmp_path / "x", into, pack(GOOD + tar.END) + b"rubbish" * 99)
    assert not list(into.iterdir())


def test_a_decompressor_takes_no_more_memory_than_it_may(tmp_path: Path, into: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1536 * MIB}]
    data = bytearray(lzma.compress(GOOD + tar.END, filters=[{**filters[0], "dict_size": MIB}]))
    # The dictionary's size in the header (xz-file-format.txt), and that one's CRC32.
    data[data.index(b"\x21\x01", 12) + 2] = 39
    size = (data[12] + 1) * 4
    data[12 + size - 4 : 12 + size] = lzma_crc(bytes(data[12 : 12 + size - 4]))
    with pytest.raises(BadSource, match="more memory than"):
        unpack(tmp_path / "x", into, bytes(data))


def lzma_crc(data: bytes) -> bytes:
    import zlib

    return zlib.crc32(data).to_bytes(4, "little")


def test_what_is_kept(tmp_path: Path, into: Path) -> None:
    members = [
        tar.file(b"not \xff UTF-8", b"1"),
        tar.long_name(b"n" * 255) + tar.file(b"n", b"2"),
        tar.header(b"link", b"2", target=b"a//b/"),
        tar.header(b"to a link", b"1", target=b"./link", size=512),
        tar.header(b"device", b"4", devices=(b"0007777", b"3777777")),
        tar.pax((b"SCHILY.xattr.user.a", b"\0\xff"), (b"mtime", b"99.000000001")) + GOOD,
        tar.pax((b"LIBARCHIVE.xattr.user.b%20c", base64.b64encode(b"v").rstrip(b"=")))
        + tar.file(b"b"),
        tar.pax((b"RHT.security.selinux", b"a:b:c")) + tar.file(b"se"),
        tar.pax((b"SCHILY.acl.access", ACL)) + tar.file(b"acl"),
        tar.pax((b"SCHILY.acl.default", ACL)) + tar.header(b"dir", b"5", mode=b"0000700"),
        tar.file(b"dir/below") + tar.file(b"later", b"old") + tar.file(b"later", b"new"),
        tar.pax((b"SCHILY.xattr.user.c", b"all"), kind=b"g") + tar.file(b"all"),
        tar.pax((b"SCHILY.xattr.user.c", b"")) + tar.file(b"none"),
        tar.file(b"old folder/") + tar.file(b"x", prefix=b"pre/fix"),
        tar.header(b"two", b"1", target=b"good") + tar.header(b"two", b"1", target=b"good"),
        tar.header(b"good", b"1", target=b"good"),
    ]
    _, left_out = unpack(tmp_path / "x.tar", into, b"".join(members) + tar.END)
    assert not left_out
    root = os.fsencode(into)
    assert Path(os.fsdecode(root + b"/not \xff UTF-8")).read_bytes() == b"1"
    assert (into / ("n" * 255)).read_bytes() == b"2"
    assert os.readlink(root + b"/to a link") == b"a//b/"  # noqa: PTH115 - its slash counts
    assert (into / "link").lstat().st_nlink == 2
    assert (into / "device").stat().st_rdev == os.makedev(0o7777, 0o3777777)
    assert os.getxattr(into / "good", "user.a") == b"\0\xff"
    assert (into / "good").stat().st_mtime_ns == 99_000_000_001
    assert (into / "good").stat().st_nlink == 2
    assert os.getxattr(into / "b", "user.b c") == b"v"
    assert os.getxattr(into / "se", "security.selinux") == b"a:b:c\0"
    assert b"\x4d\0\0\0" in os.getxattr(into / "acl", "system.posix_acl_access")
    assert b"\x4d\0\0\0" in os.getxattr(into / "dir", "system.posix_acl_default")
    # Made before its folder had that, as far as anybody can see.
    assert not os.listxattr(into / "dir/below")
    assert (into / "later").read_bytes() == b"new"
    assert os.listxattr(into / "all") == ["user.c"]
    assert not os.listxattr(into / "none")
    assert (into / "old folder").is_dir()
    assert (into / "pre/fix/x").is_file()


@pytest.mark.parametrize("form", ["gnu", "0.0", "0.1", "1.0"])
def test_holes_of_each_form(tmp_path: Path, into: Path, form: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with (source / ("holes" * 30)).open("wb") as file:
        for place in range(200):
            file.seek(place * 12288)
            file.write(b"%04d" % place)
        file.truncate(3 << 20)
    options = ["--format=gnu"] if form == "gnu" else ["--format=pax", f"--sparse-version={form}"]
    whole = tmp_path / "x.tar"
    subprocess.run(["tar", "-C", source, "-S", *options, "-cf", whole, "."], check=True)
    unpack(whole, into, whole.read_bytes())
    (made,) = into.iterdir()
    (before,) = source.iterdir()
    assert made.name == before.name
    assert made.read_bytes() == before.read_bytes()
    assert made.stat().st_blocks < 3 << 11


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    data = tar.header(b"label", b"V") + tar.pax((b"SCHILY.fflags", b"nodump")) + GOOD + tar.END
    (tmp_path / "x.tar").write_bytes(data)
    told: list[str] = []
    store = Store(tmp_path / "store")
    build_segment(store, REF, f"tar:{tmp_path}/x.tar", progress=told.append)
    assert told[-1] == (
        "skipped: volume labels (1, first of 'label'); "
        "pax keyword SCHILY.fflags (1, first of 'good')"
    )


def test_sockets_are_told_where_they_are_lost(tmp_path: Path) -> None:
    import socket

    (tmp_path / "tree").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "tree/s"))
    for fs, lost in (("erofs", []), ("ext2", ["1 socket"])):
        left_out: list[str] = []
        make_image(tmp_path / "tree", tmp_path / fs, fs, left_out=left_out)
        assert left_out == lost


@pytest.mark.parametrize("fs", ["erofs", "ext2"])
@pytest.mark.parametrize("what", ["whiteout", "opaque"])
def test_remains_of_an_overlay(tmp_path: Path, what: str, fs: str) -> None:
    """A guest's root is a layer itself: they would hide files there."""
    tree = tmp_path / "tree"
    (tree / "a/gone").mkdir(parents=True)
    if what == "whiteout":
        (tree / "a/gone").rmdir()
        os.mknod(tree / "a/gone", 0o600 | 0o020000, 0)
    else:
        os.setxattr(tree / "a/gone", "trusted.overlay.opaque", b"y")
    with pytest.raises(BadSource, match=r"a/gone.*overlay"):
        make_image(tree, tmp_path / "image", fs)


@pytest.mark.parametrize(
    ("seconds", "fs", "said"),
    [(-5, "erofs", "-5 s"), (-5, "ext2", "-5 s"), (1 << 31, "ext2", "the limit of ext2 is")],
)
def test_times_that_an_image_cannot_keep(tmp_path: Path, seconds: int, fs: str, said: str) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/odd").touch()
    os.utime(tmp_path / "tree/odd", (seconds, seconds))
    with pytest.raises(BadSource, match=f"odd.*{said}"):
        make_image(tmp_path / "tree", tmp_path / "image", fs)


@pytest.mark.parametrize("fs", ["erofs", "ext2"])
def test_as_deep_and_long_as_can_be(tmp_path: Path, fs: str) -> None:
    """mke2fs 1.47.0 writes past its heap for long paths: that is no way to another's files."""
    name = b"/".join([b"%04d" % level for level in range(400)] + [b"x" * 250] * 5)
    data = tar.long_name(name) + tar.file(b"x", b"deep") + tar.END
    (tmp_path / "x.tar").write_bytes(data)
    store = Store(tmp_path / "store")
    with suppress(BadSource):
        build_segment(store, REF, f"tar:{tmp_path}/x.tar", BuildOptions(fs=fs))
    assert not list((store.root / "tmp").iterdir())


def test_modules_that_are_no_modules(tmp_path: Path) -> None:
    modules = tmp_path / "6.1"
    modules.mkdir()
    (modules / "modules.order").touch()
    (tmp_path / "kernel").touch()
    nest(modules, 1200)
    store = Store(tmp_path / "store")
    try:
        with pytest.raises(BadSource, match="nested deeper"):
            ensure_kernel(store, kernel=tmp_path / "kernel", modules=modules)
    finally:
        assert remove_tree(modules) == ""


@pytest.mark.parametrize("fs", ["erofs", "ext2"])
@pytest.mark.parametrize("what", ["deep", "long"])
def test_a_folder_that_is_too_deep(tmp_path: Path, fs: str, what: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    if what == "deep":
        (tree / "/".join("d" * 501)).mkdir(parents=True)
    else:
        nest(tree, 300)
    try:
        with pytest.raises(BadSource, match=r"has a path of|too long"):
            make_image(tree, tmp_path / "image", fs)
    finally:
        assert remove_tree(tree) == ""


@pytest.mark.parametrize("fs", ["erofs", "ext2"])
@pytest.mark.parametrize("mtime", [b"0", b"1600000000", b"future"])
def test_the_same_archive_gives_the_same_image(tmp_path: Path, fs: str, mtime: bytes) -> None:
    """At another time of another year, by whatever clock: no clock is read."""
    text = b"%011o" % (0 if mtime == b"0" else 1_600_000_000)
    if mtime == b"future":
        text = b"%011o" % (int(time.time()) + 20)
    members = [
        tar.file(b"a/b/c", b"1", mtime=text),
        tar.header(b"l", b"2", target=b"a", mtime=text),
    ]
    (tmp_path / "x.tar").write_bytes(b"".join(members) + tar.END)
    digests = set()
    for number in range(2):
        store = Store(tmp_path / f"store{number}")
        artifact = build_segment(store, REF, f"tar:{tmp_path}/x.tar", BuildOptions(fs=fs))
        digests.add(artifact.digest)
        time.sleep(1.1)
    assert len(digests) == 1


def test_a_disk_that_an_archive_fills(tmp_path: Path) -> None:
    """A bomb ends when there is no room, and leaves nothing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    data = tar.header(b"bomb", size=b"\x80" + (1 << 40).to_bytes(11, "big"))
    (tmp_path / "x.gz").write_bytes(gzip.compress(data + bytes(8 * MIB)))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32M", "x", disk], check=True)
    try:
        store = Store(disk / "store")
        with pytest.raises(InsufficientResources) as caught:
            build_segment(store, REF, f"tar:{tmp_path}/x.gz")
        assert caught.value.needed >= 1 << 40
        # What lies about nothing fills the disk bit by bit.
        many = b"".join(tar.file(b"f%d" % n, b"x" * 4000) for n in range(9000))
        (tmp_path / "x.gz").write_bytes(gzip.compress(many + tar.END))
        with pytest.raises(InsufficientResources):
            build_segment(store, REF, f"tar:{tmp_path}/x.gz")
        assert not list((store.root / "tmp").iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


_LIMITED = """
import resource, sys
from pathlib import Path
from onecopy.images.build import BuildOptions, build_segment
from onecopy.errors import OnecopyError
from onecopy.model import Reference
from onecopy.store import Store
store = Store(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    build_segment(store, Reference.parse("x:1"), f"tar:{sys.argv[2]}", BuildOptions(fs=sys.argv[3]))
except OnecopyError as error:
    print(type(error).__name__)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10)
"""


def test_memory_does_not_grow_with_what_is_in_it(tmp_path: Path) -> None:
    """Measured in a process of its own: some MiB, for 10,000 members and 150 MiB of headers."""
    with gzip.open(tmp_path / "x.gz", "wb", 1) as out:
        out.write(GOOD)
        for number in range(2500):
            name = b"d%d/%d" % (number % 40, number)
            out.write(tar.header(name + b"f") + tar.header(name + b"d", b"5"))
            out.write(tar.header(name + b"l", b"2", target=b"x" * 90))
            out.write(tar.pax((b"comment", b"%d" % number), kind=b"g"))
            if number % 50 == 0:
                out.write(tar.pax((b"comment", b"c" * 3 * MIB)))
            out.write(tar.header(name + b"h", b"1", target=b"good"))
        out.write(tar.END)
    argv = [sys.executable, "-c", _LIMITED, f"{tmp_path}/store", f"{tmp_path}/x.gz", "erofs"]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    (grown,) = done.stdout.split()
    assert int(grown) < 24, done.stdout
    assert not list((tmp_path / "store/tmp").iterdir())


NAMES = st.sampled_from(
    [b"a", b"a/b", b"./a", b"a/", b"..", b"/a", b"l", b"l/x", b"\xff", b".", b"", b"a" * 99]
) | st.binary(max_size=99)
NUMBERS = st.sampled_from(
    [b"", b"0", b"7777777", b"17", b"\x80" + b"\0" * 7, b"\xff" * 8, b" 1 ", b"8"]
) | st.binary(max_size=8)
HEADERS = st.builds(
    lambda name, kind, size, target, mtime, mode, uid, data: (
        tar.header(name, kind, size=size, target=target, mtime=mtime, mode=mode, uid=uid)
        + tar.filled(data)
    ),
    NAMES,
    st.sampled_from([bytes([n]) for n in b"0123456756SxgLKVDM\0"]),
    st.integers(0, 2000) | st.binary(max_size=12),
    NAMES,
    NUMBERS,
    NUMBERS,
    NUMBERS,
    st.binary(max_size=2000),
)
WORDS = st.sampled_from(
    [b"GNU.sparse." + word for word in b"map major minor size offset numbytes".split()]
    + b"path linkpath size mtime uid".split()
    + [b"SCHILY.xattr.user.a", b"LIBARCHIVE.xattr.trusted.overlay.opaque", b"SCHILY.acl.access"]
)
VALUES = NAMES | st.sampled_from([b"0", b"1", b"-5", b"1" + b"0" * 18, b"0,4", b"9" * 30, ACL])
PAX = st.lists(st.tuples(WORDS, VALUES), max_size=4).map(lambda pairs: tar.pax(*pairs))
ARCHIVES = st.lists(HEADERS | PAX | st.just(GOOD), min_size=1, max_size=6).map(b"".join)


def try_out(folder: Path, data: bytes) -> None:
    """Nothing but errors of ours, and nothing beside what is unpacked."""
    into = folder / "in"
    into.mkdir()
    try:
        unpack(folder / "x.tar", into, data)
    except OnecopyError as error:
        assert error.message
        assert not list(into.iterdir())
    finally:
        assert remove_tree(into) == ""
    assert {path.name for path in folder.iterdir()} <= {"x.tar"}


@settings(
    max_examples=300,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=ARCHIVES, end=st.sampled_from([tar.END, b"", tar.END * 3, b"x"]))
def test_any_archive_is_kept_or_refused(tmp_path: Path, data: bytes, end: bytes) -> None:
    try_out(tmp_path, data + end)


@settings(
    max_examples=200,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(changes=st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), max_size=8))
def test_a_changed_archive_is_kept_or_refused(
    tmp_path: Path, changed: bytes, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(changed)
    for place, byte in changes:
        data[place % len(data)] = byte
    try_out(tmp_path, bytes(data))


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes]:
    """An ordinary archive with a bit of everything."""
    path = tmp_path_factory.mktemp("changed") / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        for number, kind in enumerate([tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.SYMTYPE]):
            info = tarfile.TarInfo(f"é{number}" * 60)
            info.type, info.linkname = kind, "x"
            info.pax_headers = {"SCHILY.xattr.user.a": "v", "mtime": "1.5"}
            if kind == tarfile.SYMTYPE:
                info.pax_headers.pop("SCHILY.xattr.user.a")
            file.addfile(info)
    yield path.read_bytes()
