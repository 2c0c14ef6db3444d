"""What shells complete, as the shells ask for it; bash itself is run."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from onecopy import cli
from onecopy.cli import bash_completion
from onecopy.cli.commands import COMMANDS
from onecopy.guest.run_directory import run_root
from onecopy.guest.runtime import Runtime
from onecopy.store import Store
from tests.command import ONECOPY
from tests.unit.guest_kit import record
from tests.unit.store_kit import put


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("ONECOPY_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    store = Store()
    put(store, "application:1")
    put(store, "other:1")
    yield store
    shutil.rmtree(run_root(store), ignore_errors=True)


def offered(line: str) -> list[str]:
    """What is offered for the last word of a line."""
    from click.shell_completion import ShellComplete

    *words, incomplete = line.split(" ")[1:]
    complete = ShellComplete(cli.onecopy, {}, "onecopy", "X")
    return [str(item.value) for item in complete.get_completions(words, incomplete)]


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("onecopy rep", ["report"]),
        ("onecopy ksm al", ["allow"]),
        ("onecopy rm app", ["application:1"]),
        ("onecopy inspect w", ["web-1", "web-2"]),
        ("onecopy boot --segment o", ["other:1"]),
        ("onecopy save x --root o", ["other:1"]),
        ("onecopy save x --from w", ["web-1", "web-2"]),
        ("onecopy save x --clone-hook com", ["command:"]),
        ("onecopy stop web-1 web", ["web-1", "web-2"]),
        ("onecopy exec w", ["web-1", "web-2"]),
        ("onecopy advise w", ["web-1", "web-2"]),
        ("onecopy grant application w", ["web-1", "web-2"]),
        ("onecopy attach web-1 app", ["application:1"]),
        ("onecopy build x --from d", ["debian:bookworm", "debian:trixie", "dir:", "disk:"]),
        ("onecopy build x --from dir:si", ["dir:site/"]),
        ("onecopy build x --from dir:site/a", ["dir:site/app.py"]),
        ("onecopy create x --range SR:2M:si", ["SR:2M:site/"]),
        ("onecopy cp w", ["w", "web-1:", "web-2:"]),
        ("onecopy completion f", ["fish"]),
    ],
)
def test_names(home: Store, monkeypatch: pytest.MonkeyPatch, line: str, values: list[str]) -> None:
    monkeypatch.setattr(Runtime, "guests", lambda _: [record("web-1"), record("web-2")])
    Path("site").mkdir()
    Path("site/app.py").touch()
    assert offered(line) == values


def test_what_is_not_there_completes_to_nothing(home: Store) -> None:
    assert offered("onecopy build x --from dir:/no/such/folder/x") == []
    assert offered("onecopy detach nobody x") == []


def test_every_argument_completes() -> None:
    """What an argument means has a type of its own, which completes it; but for new names."""
    free = {"size", "program"}
    for name in COMMANDS:
        command = cli.onecopy.get_command(click.Context(cli.onecopy), name)
        assert command
        for param in command.params:
            if isinstance(param, click.Argument) and param.name not in free:
                own = type(param.type).shell_complete is not click.ParamType.shell_complete
                assert own, f"{name} {param.name}"


def _bash(line: str, script: str, home: Path) -> list[str]:
    """What bash, which splits words at colons, puts in place of the last one."""
    asked = f"""
        set -f
        eval "$SCRIPT"
        compopt() {{ :; }}
        COMP_LINE=$LINE COMP_POINT=${{#LINE}}
        COMP_WORDS=({line.replace(":", " : ")}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _onecopy_completion onecopy
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {
        **os.environ,
        "SCRIPT": script,
        "LINE": line,
        "ONECOPY_HOME": str(home),
        "PATH": f"{Path(ONECOPY).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "--norc", "-c", asked], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_what_has_a_colon(home: Store, tmp_path: Path) -> None:
    put(home, "application:2")
    script = subprocess.run(
        [ONECOPY, "completion", "bash"], capture_output=True, text=True, check=True
    ).stdout
    assert _bash("onecopy rm app", script, home.root) == ["application:1", "application:2"]
    # Only what stands behind the colon is replaced.
    assert _bash("onecopy rm application:", script, home.root) == ["1", "2"]
    (tmp_path / "sub").mkdir()
    assert _bash(f"onecopy build x --from dir:{tmp_path}/su", script, home.root) == [
        f"{tmp_path}/sub/"
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("onecopy rm a:1 ", ["onecopy", "rm", "a:1", ""]),
        ("onecopy rm 'a b", ["onecopy", "rm", "a b"]),
        ("", [""]),
    ],
)
def test_a_line_is_split(line: str, words: list[str]) -> None:
    assert bash_completion._words(line) == words


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_loads(shell: str) -> None:
    done = subprocess.run([ONECOPY, "completion", shell], capture_output=True, text=True)
    assert done.returncode == 0
    assert f"_ONECOPY_COMPLETE={shell}_complete" in done.stdout
    # bash is everywhere; the other two are tried where they are.
    if shell == "bash":
        command = ["bash", "--norc", "-c", f"{done.stdout}\ncomplete -p onecopy"]
        loaded = subprocess.run(command, capture_output=True, text=True, check=True)
        assert loaded.stdout.startswith("complete")
    elif program := shutil.which(shell):
        subprocess.run([program, "-n"], input=done.stdout, text=True, check=True)


def test_an_error_is_no_output(tmp_path: Path) -> None:
    """A store that cannot be opened completes to nothing."""
    (tmp_path / "file").touch()
    environment = {
        **os.environ,
        "ONECOPY_HOME": str(tmp_path / "file"),
        "_ONECOPY_COMPLETE": "fish_complete",
        "COMP_WORDS": "onecopy rm ",
        "COMP_CWORD": "",
    }
    argv = [sys.executable, "-m", "onecopy"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")
