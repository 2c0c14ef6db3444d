"""Did you mean: commands, options, guests and references."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecopy import cli
from onecopy.cli import suggest
from onecopy.cli.commands import COMMANDS
from onecopy.guest.run_directory import run_root
from onecopy.guest.runtime import Runtime
from onecopy.store import Store
from tests.unit.guest_kit import record
from tests.unit.store_kit import put


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("ONECOPY_HOME", str(tmp_path))
    store = Store()
    yield store
    shutil.rmtree(run_root(store), ignore_errors=True)


def hint(capsys: pytest.CaptureFixture[str], line: str) -> str:
    assert cli.main(line.split())
    return capsys.readouterr().err.splitlines()[-1].removeprefix("hint: ")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("images", "did you mean `onecopy ls`?"),
        ("rmi x", "did you mean `onecopy rm`?"),
        ("start x", "did you mean `onecopy run`?"),
        ("kill x", "did you mean `onecopy stop --now`?"),
        ("repotr", "did you mean `onecopy report`?"),
        ("ksm allwo x", "did you mean `onecopy ksm allow`?"),
        ("qqqqq", "`onecopy --help` lists the commands"),
        ("a" * 100_000, "`onecopy --help` lists the commands"),
        ("ls --knd segment", "did you mean --kind?"),
        ("run --ready true x", "`onecopy boot` has it"),
        ("run x --name y", "options stand before the first argument"),
    ],
)
def test_a_wrong_word(capsys: pytest.CaptureFixture[str], line: str, told: str) -> None:
    assert hint(capsys, line).startswith(told)


def test_what_is_known_elsewhere_is_no_command_here() -> None:
    assert not set(suggest.ELSEWHERE) & set(COMMANDS)
    for command in suggest.ELSEWHERE.values():
        name = command.split()[0]
        assert name in COMMANDS or name.startswith("--"), command


def test_a_guest(
    home: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "guests", lambda _: [record("web-1"), record("db")])
    for line in ("logs wbe-1", "stop wbe-1", "exec wbe-1 true"):
        assert hint(capsys, line).startswith("did you mean web-1? list the guests")
    assert hint(capsys, "logs qqqqq") == "list the guests with `onecopy ps`"


def test_a_reference(home: Store, capsys: pytest.CaptureFixture[str]) -> None:
    put(home, "debian:12")
    assert hint(capsys, "verify debain:12").startswith("did you mean debian:12?")
    assert hint(capsys, "logs debian") == (
        "debian is a segment, and `onecopy boot debian` starts guests from it; "
        "list the guests with `onecopy ps`"
    )
    assert hint(capsys, "run debian:12").startswith("`onecopy boot debian:12` boots it")
