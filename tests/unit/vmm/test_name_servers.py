"""The host's name servers in place of which a VMM has a copy, and how that stays fresh."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from onecopy.vmm import name_servers
from tests.conftest import cannot_run


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host's folder."""
    if not name_servers.can_hide():
        cannot_run("mounts are for root, and not in every container")
    path = tmp_path / "etc"
    (path / "alternatives").mkdir(parents=True)
    (path / "resolv.conf").write_text("nameserver 192.0.2.1\n")
    (path / "passwd").write_text("everybody")
    (path / "ld.so.cache").write_bytes(bytes(1 << 17))
    (path / "alternatives/libx.so").symlink_to("/usr/lib/libx.so")
    monkeypatch.setattr(name_servers, "_ETC", path)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def test_a_folder_of_its_own_needs_no_copy(etc: Path, run: Path) -> None:
    own = run / "resolve"
    own.mkdir()
    names = etc / "resolv.conf"
    names.rename(own / "stub")
    names.symlink_to(own / "stub")
    assert name_servers.stand_in(run) is None
    assert name_servers.directory() == own
    names.unlink()
    assert name_servers.stand_in(run) is None


def test_what_replaces_it_is_seen_by_who_has_the_copy(etc: Path, run: Path) -> None:
    name_servers.refresh(run)
    assert not list(run.iterdir())
    mine = name_servers.stand_in(run)
    assert mine
    names = etc / "resolv.conf"

    def seen() -> tuple[set[str], str]:
        return {each.name for each in etc.iterdir()}, names.read_text()

    there = {"resolv.conf", "ld.so.cache", "alternatives"}
    with ThreadPoolExecutor(1) as confined:
        confined.submit(name_servers.hide, mine).result()
        _written(etc / "new", "nameserver 192.0.2.2\n# x\n").rename(names)
        assert confined.submit(seen).result() == (there, "nameserver 192.0.2.1\n")
        name_servers.refresh(run)
        assert confined.submit(seen).result() == (there, names.read_text())
        # A shorter one, of which nothing is left behind.
        _written(etc / "new", "#\n").rename(names)
        name_servers.refresh(run)
        assert confined.submit(seen).result() == (there, "#\n")
        library = etc / "alternatives/libx.so"
        assert confined.submit(os.readlink, library).result() == "/usr/lib/libx.so"
    # Nobody else sees any of it.
    assert (etc / "passwd").exists()
    assert not list((mine / "alternatives").iterdir())
    assert str(run) not in Path("/proc/self/mountinfo").read_text(errors="replace")
    name_servers.forget(run)
    assert not list(run.iterdir())


def test_a_planted_link_is_not_followed(etc: Path, run: Path) -> None:
    precious = _written(run / "precious", "precious")
    mine = name_servers.stand_in(run)
    assert mine
    (mine / "resolv.conf").unlink()
    (mine / "resolv.conf").symlink_to(precious)
    name_servers.refresh(run)
    with pytest.raises(OSError, match="symbolic links"):
        name_servers.stand_in(run)
    assert precious.read_text() == "precious"


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
