"""Debian roots from the real mirror are reproducible and small, and errors are actionable.

These tests are here because they are slow (about 20 s for a root). They need no guest.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onecopy.errors import BadSource, InsufficientResources
from onecopy.images.fs_image import make_image
from onecopy.images.source import open_source
from onecopy.images.tree import find_init
from onecopy.store import Artifact
from tests.conftest import cannot_run
from tests.vm.kept import SUITE, TEST_PACKAGES


@pytest.fixture(autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        cannot_run("Debian roots are built by root")


def build(into: Path, suite: str, *include: str) -> Path:
    into.mkdir()
    try:
        return open_source(f"debian:{suite}", include).unpack(into, lambda _: None)
    except BadSource as error:
        if "cannot reach" in error.message:
            cannot_run(error.message)
        raise


@contextmanager
def mounted(image: Path, point: Path) -> Iterator[Path]:
    point.mkdir()
    subprocess.run(["mount", "-o", "ro,loop", image, point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)


def test_two_builds_are_one(python_root: Artifact, tmp_path: Path) -> None:
    """The kept root and another; each installation makes a certificate for this host's name."""
    tree = build(tmp_path / "tree", SUITE, *TEST_PACKAGES[SUITE])
    make_image(tree, tmp_path / "image", "erofs")
    kept = python_root.layer("image").path
    if (tmp_path / "image").read_bytes() != kept.read_bytes():
        with mounted(kept, tmp_path / "kept") as other:
            argv = ["diff", "-rq", "--no-dereference", str(tree), str(other)]
            raise AssertionError(subprocess.run(argv, capture_output=True, text=True).stdout)
    assert kept.stat().st_size < 250 << 20

    assert find_init(tree) is None
    assert (tree / "usr/sbin/make-ssl-cert").exists()
    assert not list(tree.glob("etc/ssl/*/*snakeoil*"))
    # Where packages link manual pages of theirs (update-alternatives(1)).
    assert all(page.is_symlink() for page in (tree / "usr/share/man/man1").iterdir())
    # Compiled files must still fit their sources, or every import would compile anew.
    with mounted(tmp_path / "image", tmp_path / "mount") as point:
        said = subprocess.run(
            ["chroot", point, "python3", "-v", "-c", "import json, argparse"],
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        ).stderr
    assert re.search(r"json/__pycache__/__init__\S+pyc matches ", said)
    assert "bytecode is stale" not in said
    assert not re.search(r"code object from '?\S+\.py\b", said)


def test_a_root_with_systemd_has_an_init(services_root: Artifact, tmp_path: Path) -> None:
    # The kept root was built as any: what is in its image is what there is to see.
    image = services_root.layer("image").path
    with mounted(image, tmp_path / "root") as tree:
        assert find_init(tree) == "/sbin/init"
        assert (tree / "etc/machine-id").read_bytes() == b""
        assert not (tree / "etc/resolv.conf").exists()
        assert (tree / "usr/lib/systemd/system/multi-user.target").exists()
        assert (tree / "usr/bin/login").exists()
        assert (tree / "usr/lib/systemd/systemd-udevd").exists()


def test_an_unknown_suite(tmp_path: Path) -> None:
    with pytest.raises(BadSource, match="no suite 'nosuchsuite'") as caught:
        build(tmp_path / "root", "nosuchsuite")
    assert "bookworm" in caught.value.hint


def test_an_unknown_package(tmp_path: Path) -> None:
    with pytest.raises(BadSource, match="has no package nosuchpackage\n"):
        build(tmp_path / "root", "bookworm", "nosuchpackage", "python3")


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(BadSource, match="cannot reach the Debian mirror") as caught:
        open_source("debian:bookworm").unpack(tmp_path, lambda _: None)
    assert "network" in caught.value.hint


def test_too_small_a_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16M", "small", disk], check=True)
    try:
        with pytest.raises(InsufficientResources):
            open_source("debian:bookworm").unpack(disk, lambda _: None)
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)
