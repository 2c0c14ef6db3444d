"""A store in a folder that a shell would make something of: nothing runs of its name.

Not here: where no store can lie (unit/test_store_open.py), that no shell's text has a path in it
(unit/test_shell.py).
"""

import os
from pathlib import Path

import pytest

from onecopy.errors import BadSource
from onecopy.images.build import BuildOptions, build_segment
from onecopy.images.deb_packages import fetch_package, host_suite
from onecopy.model import Reference
from onecopy.store import Store
from tests.conftest import cannot_run

ODD = "a b;touch $HOME\x27 `touch x` $(touch y) | & <z>, =[*] ü"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if os.geteuid() != 0:
        cannot_run("packages are fetched as root here")
    monkeypatch.setenv("ONECOPY_HOME", str(tmp_path / ODD))
    monkeypatch.chdir(tmp_path)
    return Store()


def test_a_package_is_fetched_into_an_odd_store(store: Store, tmp_path: Path) -> None:
    with store.workspace() as work:
        try:
            package = fetch_package(["netbase"], host_suite(), work, lambda _: None)
        except BadSource as error:
            if "Could not" in error.message or "Unable to connect" in error.message:
                cannot_run(f"no Debian mirror is reached: {error.message[-200:]}")
            raise
        assert package.read_bytes().startswith(b"!<arch>")
        assert package.parent == work / "downloads"
    assert [path.name for path in tmp_path.iterdir()] == [ODD]


@pytest.mark.parametrize("fs", ["erofs", "ext2"])
def test_a_segment_is_built_in_an_odd_store(store: Store, tmp_path: Path, fs: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("content")
    build_segment(store, Reference.parse("x:1"), f"dir:{source}", BuildOptions(fs=fs))
    assert not list((store.root / "tmp").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {ODD, "source"}
