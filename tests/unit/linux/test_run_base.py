"""The parent of run directories must be this user's alone: another user may have made it."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onecopy.errors import NotPermitted
from onecopy.guest.runtime import Runtime
from onecopy.linux.lock import locked_blocking
from onecopy.linux.run_base import make_run_base, run_base
from tests.conftest import cannot_run
from tests.unit.other_user import NOBODY, as_nobody

TEMPORARY = Path(f"/tmp/onecopy-{NOBODY}")
OTHER = 12345


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Where another user's run folders lie without XDG_RUNTIME_DIR."""
    if os.geteuid():
        cannot_run("only root can become someone else")
    if TEMPORARY.exists():
        cannot_run(f"{TEMPORARY} is in use")
    yield TEMPORARY
    if TEMPORARY.is_symlink() or TEMPORARY.is_file():
        TEMPORARY.unlink()
    shutil.rmtree(TEMPORARY, ignore_errors=True)


def used(runtime: str | None = None) -> Callable[[], Any]:
    """What another user is told: the folder, or the error."""

    def tell() -> Any:
        os.environ.pop("XDG_RUNTIME_DIR", None)
        if runtime is not None:
            os.environ["XDG_RUNTIME_DIR"] = runtime
        try:
            base = make_run_base()
        except NotPermitted as error:
            return {"error": error.message, "hint": error.hint}
        return {"path": str(base), "mode": base.stat().st_mode & 0o777}

    return tell


def test_it_is_made_for_its_user_alone(temporary: Path) -> None:
    for _ in range(2):
        found = as_nobody(used())
        assert found == {"path": str(temporary / "onecopy"), "mode": 0o700}
        assert temporary.stat().st_mode & 0o777 == 0o700


def test_one_that_others_could_read_is_closed(temporary: Path) -> None:
    temporary.mkdir(0o755)
    os.chown(temporary, NOBODY, NOBODY)
    assert as_nobody(used())["mode"] == 0o700
    assert temporary.stat().st_mode & 0o777 == 0o700


def _open(path: Path) -> None:
    path.mkdir()
    os.chown(path, NOBODY, NOBODY)
    path.chmod(0o777)


def _another_s(path: Path) -> None:
    path.mkdir(0o700)
    os.chown(path, OTHER, OTHER)


def _inside_another_s(path: Path) -> None:
    path.mkdir()
    (path / "onecopy").mkdir()
    os.chown(path / "onecopy", NOBODY, NOBODY)
    _give(path)


def _give(path: Path) -> None:
    path.chmod(0o755)
    os.chown(path, OTHER, OTHER)


def _link(path: Path) -> None:
    path.symlink_to("/var/tmp")


def _file(path: Path) -> None:
    path.touch()
    os.chown(path, NOBODY, NOBODY)


@pytest.mark.parametrize("planted", [_open, _another_s, _inside_another_s, _link, _file])
def test_one_that_somebody_else_has_a_hand_in_is_refused(
    temporary: Path, planted: Callable[[Path], None]
) -> None:
    planted(temporary)
    found = as_nobody(used())
    assert str(temporary) in found["error"]
    assert "XDG_RUNTIME_DIR" in found["hint"]


@pytest.mark.parametrize("planted", [_open, _another_s, _inside_another_s, _link, _file])
def test_so_is_a_runtime_folder(planted: Callable[[Path], None]) -> None:
    path = Path(f"/tmp/{secrets.token_hex(8)}")
    if os.geteuid():
        cannot_run("only root can become someone else")
    planted(path)
    try:
        assert str(path) in as_nobody(used(str(path)))["error"]
    finally:
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)


def test_a_relative_runtime_folder_counts_as_none(temporary: Path) -> None:
    assert as_nobody(used("run"))["path"] == str(temporary / "onecopy")


def test_a_command_says_so(temporary: Path, tmp_path: Path) -> None:
    _another_s(temporary)
    home = Path(f"/tmp/{secrets.token_hex(8)}")

    def tell() -> Any:
        os.environ.pop("XDG_RUNTIME_DIR", None)
        try:
            Runtime.open(home)
        except NotPermitted as error:
            return error.message
        return "no error"

    assert str(temporary) in as_nobody(tell)
    assert not home.exists()


def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic"), locked_blocking(tmp_path / ".lock"):
        pass
    assert not (tmp_path / "victim").exists()


def test_root_has_one_of_its_own() -> None:
    if os.geteuid():
        cannot_run("only root is root")
    assert run_base() == Path("/run/onecopy")
