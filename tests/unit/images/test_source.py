"""What can be a source of a build, and what is refused before anything is written.

Not here: what becomes of a good one (test_fs_image.py, vm/test_build_debian.py).
"""

import hashlib
import io
import os
import re
import struct
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from onecopy.errors import (
    BadSource,
    InsufficientResources,
    InvalidInput,
    NotPermitted,
    OnecopyError,
)
from onecopy.images.normalise import normalise
from onecopy.images.source import open_source
from onecopy.images.sources.debian import DebianSource
from onecopy.images.tree import find_init, resolve_inside
from tests.conftest import cannot_run

Member = tuple[str, bytes, str]


def archive(path: Path, *members: Member) -> Path:
    with tarfile.open(path, "w") as file:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            info.size = 4 if kind == tarfile.REGTYPE else 0
            file.addfile(info, io.BytesIO(b"data"))
    return path


@pytest.fixture
def into(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        cannot_run("unpacking sets owners: root only")
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def unpack(source: str, into: Path) -> Path:
    return open_source(source).unpack(into, lambda _: None)


@pytest.mark.parametrize(
    ("text", "include", "said"),
    [
        ("", (), "is not a source"),
        ("bookworm", (), "is not a source"),
        ("docker:alpine", (), "is not a source"),
        ("dir:", (), "is not a source"),
        ("debian:", (), "is not a source"),
        ("debian:--help", (), "not a Debian suite"),
        ("debian:../x", (), "not a Debian suite"),
        ("debian:bookworm", ("--option",), "not a package name"),
        ("debian:bookworm", ("./x.deb",), "not a package name"),
        ("debian:bookworm", ("a,b",), "not a package name"),
        ("debian:bookworm", ("",), "not a package name"),
        ("dir:/tmp", ("python3",), "cannot be added"),
        ("tar:/tmp/x", ("python3",), "cannot be added"),
    ],
)
def test_what_cannot_be_meant(text: str, include: tuple[str, ...], said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        open_source(text, include)
    assert caught.value.hint


@pytest.mark.parametrize(
    "package",
    ["g++", "libc6:amd64", "python3=3.11.2-1+b1", "curl/bookworm", "git=1:2.39.5-0", "ssh-server^"],
)
def test_what_apt_calls_a_package(package: str) -> None:
    assert open_source("debian:bookworm", [package]).label == "debian:bookworm"


def test_packages_are_a_set() -> None:
    source = open_source("debian:trixie", ["b", "a", "b"])
    assert isinstance(source, DebianSource)
    assert (source.suite, source.packages, source.variant) == ("trixie", ("a", "b"), "essential")
    assert source.installed == ("a", "b")
    with_systemd = open_source("debian:trixie", ["systemd-sysv"])
    assert isinstance(with_systemd, DebianSource)
    assert with_systemd.variant == "minbase"
    assert with_systemd.installed == ("systemd-sysv", "udev", "kmod")


@pytest.mark.parametrize("path", ["/", "/proc", "/proc/self", "/sys/kernel", "/dev", "/run"])
def test_the_hosts_own_folders_are_refused(path: str) -> None:
    with pytest.raises(BadSource, match="running host's system"):
        open_source(f"dir:{path}")


def test_a_link_to_the_hosts_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/")
    with pytest.raises(BadSource, match="running host's system"):
        open_source(f"dir:{tmp_path}/link")


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    for name, said in (
        ("missing", "No such file"),
        ("file", "not a directory"),
        ("file/x", "Not a directory"),
        ("circle", "cannot open"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(BadSource, match=said) as caught:
            open_source(f"dir:{tmp_path}/{name}")
        assert caught.value.hint


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(BadSource, match="is empty"):
        open_source(f"dir:{tmp_path}").unpack(tmp_path / "into", lambda _: None)


def test_a_user_who_may_not(tmp_path: Path) -> None:
    """As user nobody, in a real process of its own."""
    if os.geteuid() != 0:
        cannot_run("only root can become another user")
    (tmp_path / "secret").mkdir(0o700)
    (tmp_path / "secret/file").touch()
    errors: dict[str, type[OnecopyError]] = {
        "debian:bookworm": NotPermitted,
        "tar:/x": NotPermitted,
        f"dir:{tmp_path}/secret": BadSource,
    }
    for source, kind in errors.items():
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            try:
                unpack(source, tmp_path)
                os.write(writer, b"nothing raised")
            except OnecopyError as error:
                os.write(writer, f"{type(error).__name__} {error.hint}".encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            said = pipe.read().decode()
        os.waitpid(child, 0)
        assert said.startswith(kind.__name__), source
        assert "run as root" in said or "path of a directory" in said


def test_archives_that_are_none(tmp_path: Path, into: Path) -> None:
    (tmp_path / "zero").touch()
    (tmp_path / "noise").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "no members").write_bytes(bytes(10240))
    for name, said in (
        ("missing", "No such file"),
        ("into", "is not a regular file"),
        ("zero", "it is not a tar"),
        ("noise", "it is not a tar"),
        ("no members", "is empty"),
    ):
        with pytest.raises(BadSource, match=said) as caught:
            unpack(f"tar:{tmp_path}/{name}", into)
        assert caught.value.hint
    assert not list(into.iterdir())


@pytest.mark.parametrize("program", ["", "gzip", "bzip2", "xz", "zstd"])
def test_a_broken_archive(tmp_path: Path, into: Path, program: str) -> None:
    (tmp_path / "content").write_bytes(os.urandom(200_000))
    whole = tmp_path / "whole.tar"
    pack = ["tar", "-C", os.fspath(tmp_path), "-cf", os.fspath(whole), "content"]
    subprocess.run([*pack, *([f"-I{program}"] if program else [])], check=True)
    whole.write_bytes(whole.read_bytes()[:100_000])
    with pytest.raises(BadSource, match="cannot unpack"):
        unpack(f"tar:{whole}", into)
    assert not list(into.iterdir())


@pytest.mark.parametrize(
    ("member", "named"),
    [
        (("/etc/passwd", tarfile.REGTYPE, ""), "'/etc/passwd'"),
        (("a/../../x", tarfile.REGTYPE, ""), "'a/../../x'"),
        (("..", tarfile.DIRTYPE, ""), "'../?'"),
        (("link", tarfile.LNKTYPE, "/etc/passwd"), "'link'"),
        (("link", tarfile.LNKTYPE, "../../etc/passwd"), "'link'"),
        (('a" link to "b', tarfile.LNKTYPE, "../up"), "link to"),
    ],
)
def test_members_that_lead_out(tmp_path: Path, into: Path, member: Member, named: str) -> None:
    path = archive(tmp_path / "x.tar", ("good", tarfile.REGTYPE, ""), member)
    with pytest.raises(BadSource, match=named):
        unpack(f"tar:{path}", into)
    assert not list(into.iterdir())


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("relative", [False, True])
def test_members_through_a_link_that_leads_out(
    tmp_path: Path, into: Path, kind: bytes, relative: bool
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    before = outside.stat().st_mtime_ns
    link = ("link", tarfile.SYMTYPE, "../outside" if relative else f"{outside}")
    member = ("mine", kind, "link/secret") if kind == tarfile.LNKTYPE else ("link/new", kind, "")
    with pytest.raises(BadSource, match="cannot unpack"):
        unpack(f"tar:{archive(tmp_path / 'x.tar', link, member)}", into)
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside.stat().st_mtime_ns, (outside / "secret").stat().st_nlink) == (before, 1)


def test_names_that_only_look_dangerous(tmp_path: Path, into: Path) -> None:
    names = ["..a", "b..", "c/...", 'q" link to "../x', "back\\slash", "new\nline", "-rf", "*"]
    path = archive(tmp_path / "x.tar", *((name, tarfile.REGTYPE, "") for name in names))
    unpack(f"tar:{path}", into)
    found = {os.fspath(p.relative_to(into)) for p in into.rglob("*") if p.is_file()}
    assert found == set(names)


def test_a_tar_that_does_not_fit(tmp_path: Path, into: Path) -> None:
    (tmp_path / "hole").touch()
    os.truncate(tmp_path / "hole", 1 << 43)
    path = tmp_path / "x.tar"
    subprocess.run(["tar", "-C", tmp_path, "-S", "-cf", path, "hole"], check=True)
    with pytest.raises(InsufficientResources) as caught:
        unpack(f"tar:{path}", into)
    assert caught.value.needed >= 1 << 43
    assert not list(into.iterdir())


def test_links_are_followed_inside_only(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "usr/sbin").mkdir(parents=True)
    (tree / "sbin").symlink_to("usr/sbin")
    (tree / "up").symlink_to("../../../../usr")
    (tree / "circle").symlink_to("circle")
    (tree / "host").symlink_to("/etc/passwd")
    assert resolve_inside(tree, "/sbin/init") == tree / "usr/sbin/init"
    assert resolve_inside(tree, "up/./sbin/../x") == tree / "usr/x"
    assert resolve_inside(tree, "host") == tree / "etc/passwd"
    assert resolve_inside(tree, "/circle") is None


def test_init_is_what_the_guest_will_find(tmp_path: Path) -> None:
    systemd = tmp_path / "usr/lib/systemd/systemd"
    (tmp_path / "usr/sbin").mkdir(parents=True)
    (tmp_path / "sbin").symlink_to("usr/sbin")
    (tmp_path / "usr/sbin/init").symlink_to("/usr/lib/systemd/systemd")
    assert find_init(tmp_path) is None
    systemd.parent.mkdir(parents=True)
    systemd.touch(0o644)
    assert find_init(tmp_path) is None
    systemd.chmod(0o755)
    assert find_init(tmp_path) == "/sbin/init"
    (tmp_path / "usr/sbin/init").unlink()
    assert find_init(tmp_path) == "/usr/lib/systemd/systemd"
    # The host has this one, the tree has not.
    (tmp_path / "usr/sbin/init").symlink_to("/bin/true")
    assert find_init(tmp_path) == "/usr/lib/systemd/systemd"


def test_what_differs_between_runs_is_taken_out(tmp_path: Path) -> None:
    for name in (
        "etc/hostname",
        "etc/ssh/ssh_host_ed25519_key",
        "etc/ssh/sshd_config",
        "etc/ssl/certs/ssl-cert-snakeoil.pem",
        "etc/ssl/private/ssl-cert-snakeoil.key",
        "var/lib/rabbitmq/.erlang.cookie",
        "var/log/apt/term.log",
        "var/cache/ldconfig/aux-cache",
        "etc/machine-id",
        "usr/bin/tool",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "etc/ssl/certs/0a1b2c3d.0").symlink_to("ssl-cert-snakeoil.pem")
    (tmp_path / "etc/shadow").write_text("root:*:20780:0:99999:7:::\nme:!:1::::::\n")
    old = 10 * 86400
    os.utime(tmp_path / "usr/bin/tool", (5, old))
    os.utime(tmp_path / "etc/ssh/sshd_config", (5, 5))
    assert normalise(tmp_path, time.time() - 60) == []
    left = [p for p in tmp_path.rglob("*") if p.is_symlink() or p.is_file()]
    assert {os.fspath(p.relative_to(tmp_path)) for p in left} == {
        "etc/machine-id",
        "etc/shadow",
        "etc/ssh/sshd_config",
        "usr/bin/tool",
    }
    assert (tmp_path / "etc/machine-id").read_bytes() == b""
    assert (tmp_path / "var/log/apt").is_dir()
    assert (tmp_path / "etc/shadow").read_text() == "root:*:10:0:99999:7:::\nme:!:10::::::\n"
    times = {p.name: p.stat().st_mtime for p in [tmp_path, *tmp_path.rglob("*")]}
    assert times.pop("sshd_config") == 5
    assert set(times.values()) == {old}


def test_what_cannot_be_taken_out_is_told(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for name in ("var/lib/postgresql/15/main/global/pg_control", "var/lib/mysql/ibdata1"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert normalise(tmp_path, time.time() - 60) == [
        "var/lib/mysql",
        "var/lib/postgresql/15/main",
    ]


def keystore(*dates: int) -> bytes:
    """A Java keystore (JKS) with one certificate of each date (milliseconds)."""
    data = bytes.fromhex("feedfeed00000002") + struct.pack(">I", len(dates))
    for number, date in enumerate(dates):
        alias, content = f"debian:{number}.pem".encode(), b"certificate" * number
        data += struct.pack(">IH", 2, len(alias)) + alias + struct.pack(">Q", date)
        data += struct.pack(">H", 5) + b"X.509" + struct.pack(">I", len(content)) + content
    # Of the password in UTF-16, a phrase of its author's, and all of it.
    digest = hashlib.sha1("changeit".encode("utf-16-be") + b"Mighty Aphrodite" + data)  # noqa: S324
    return data + digest.digest()


def test_dates_of_javas_certificates(tmp_path: Path) -> None:
    path = tmp_path / "etc/ssl/certs/java/cacerts"
    path.parent.mkdir(parents=True)
    (tmp_path / "old").touch()
    os.utime(tmp_path / "old", (5, 1000))
    path.write_bytes(keystore(1, 1 << 40, 3))
    normalise(tmp_path, time.time() - 60)
    assert path.read_bytes() == keystore(1_000_000, 1_000_000, 1_000_000)
    # What is of another form, or cut off, stays as it is.
    for other in (b"", b"\xfe\xed", keystore(1, 2)[:-30], keystore(1)[:40], keystore(1) + b"x"):
        path.write_bytes(other)
        normalise(tmp_path, time.time() - 60)
        assert path.read_bytes() == other


@pytest.mark.parametrize(
    ("printed", "said", "hint"),
    [
        (
            "Setting up one (1) ...\nSetting up two (2) ...\ntwo: no daemon\n"
            "dpkg: error processing package two (--configure):\n"
            " installed two package post-installation script subprocess returned error 1\n"
            "Errors were encountered while processing:\n two\n"
            "E: Sub-process env returned an error code (1)\nE: setup failed: E: apt-get failed\n",
            r"^the package two of Debian sid cannot be installed\n[^$]*two: no daemon\n",
            "in a running guest",
        ),
        (
            "E: Version '9.9' for 'python3' was not found\nE: mmdebstrap failed to run\n",
            "^Debian sid has no python3 of 9.9\n",
            "apt list -a python3",
        ),
        (
            "E: Release file for http://deb.debian.org/debian/dists/sid/InRelease is expired "
            "(invalid since 23d 16h 23min 0s). Updates for this repository will not be applied.\n",
            "^the Debian mirror is outdated, or .*dists/sid/InRelease\n",
            "clock",
        ),
        (
            "E: Package 'mail-agent' has no installation candidate\n"
            "E: Unable to locate package nosuch\n",
            "^Debian sid has no package mail-agent, nosuch\n",
            "virtual package",
        ),
    ],
)
def test_what_apt_says(printed: str, said: str, hint: str) -> None:
    error = DebianSource("sid", ()).explain(printed)
    assert re.search(said, error.message)
    assert hint in error.hint
