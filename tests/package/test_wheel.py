"""A newcomer's check: from the wheel alone, in an empty directory, the README's commands work.

The wheel is built from the source archive, as installers without wheels do.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

import onecopy
from tests.conftest import cannot_run
from tests.console import follow, sessions

PROJECT = Path(__file__).parents[2]


def run(*argv: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a program, which must succeed; return what it prints."""
    done = subprocess.run(
        argv, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{argv}: {done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the wheel and the source archive."""
    if not importlib.util.find_spec("build"):
        cannot_run("build is not installed: script/bootstrap --docs")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, PROJECT, cwd=out)
    return out


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel and what it depends on."""
    where = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", where, cwd=where)
    (wheel,) = dist.glob("*.whl")
    run(where / "bin/python", "-m", "pip", "install", "--quiet", wheel, cwd=where)
    return where / "bin"


@pytest.fixture
def outside(installed: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a user who has no checkout; guests end afterwards."""
    keep = ("LANG", "http_proxy", "https_proxy", "no_proxy", "TMPDIR")
    env = {name: os.environ[name] for name in keep if name in os.environ}
    env |= {"HOME": str(tmp_path), "ONECOPY_HOME": str(tmp_path / "store")}
    env["PATH"] = f"{installed}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    yield env
    if (tmp_path / "store").exists():
        run(installed / "onecopy", "stop", "--all", cwd=tmp_path, env=env)


def test_the_archives_have_what_they_need(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "mkdocs.yml", "docgen/man.py"} <= names
    assert {"src/onecopy/py.typed", "src/onecopy/images/files/init"} <= names
    sources = {f"vmm/files/fork_{name}.c" for name in ("server", "child", "preload")}
    assert {f"src/onecopy/{name}" for name in sources} <= names
    (wheel,) = dist.glob("*.whl")
    # It is for any machine, so each compiles the library for itself.
    assert wheel.name.endswith("-py3-none-any.whl")
    assert {f"onecopy/{name}" for name in sources} <= set(ZipFile(wheel).namelist())
    assert not [name for name in names if name.startswith((".venv", "out/", ".cache", ".git/"))]


def test_the_source_archive_installs(dist: Path, tmp_path: Path) -> None:
    """What pip makes of the archive is what the wheel has."""
    (archive,) = dist.glob("*.tar.gz")
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    for name, source in (("archive", archive), ("wheel", wheel)):
        run(*pip, "--no-build-isolation", "--target", tmp_path / name, source, cwd=tmp_path)
    found = [
        {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*.*")}
        for name in ("archive", "wheel")
    ]
    assert found[0] == found[1]
    assert len(found[0]) > 150


def test_it_runs_outside_a_checkout(outside: dict[str, str], tmp_path: Path) -> None:
    assert shutil.which("onecopy", path=outside["PATH"])
    said = run("onecopy", "--version", cwd=tmp_path, env=outside)
    assert said == f"onecopy {onecopy.__version__}\n"
    told = run("python", "-c", "import onecopy; print(onecopy.__file__)", cwd=tmp_path, env=outside)
    assert str(PROJECT) not in told


def test_the_metadata_is_whole(outside: dict[str, str], tmp_path: Path) -> None:
    ask = "import json, importlib.metadata as m; print(json.dumps(m.metadata('onecopy').items()))"
    told = dict(json.loads(run("python", "-c", ask, cwd=tmp_path, env=outside)))
    for field in ("Summary", "License-Expression", "Project-URL", "Keywords", "Classifier"):
        assert told[field], field
    assert told["Description-Content-Type"] == "text/markdown"
    assert told["Version"] == onecopy.__version__


def test_the_readme_s_commands_work(outside: dict[str, str], tmp_path: Path) -> None:
    if os.geteuid():
        cannot_run("only root can build a root from Debian packages")
    empty = tmp_path / "empty"
    empty.mkdir()
    (session,) = sessions((PROJECT / "README.md").read_text())
    assert [step.command.split()[:2] for step in session[:3]] == [
        ["onecopy", "build"],
        ["onecopy", "save"],
        ["onecopy", "run"],
    ]
    follow(session, empty, outside, only=True)
    told = run("onecopy", "ps", "--format", "{{.forked}}", cwd=empty, env=outside)
    assert told == "true\n" * 4
    # Each guest says itself who it is.
    for number in range(1, 5):
        name = f"web-{number}"
        said = run("onecopy", "exec", name, "hostname", cwd=empty, env=outside)
        assert said == f"{name}\n"
    assert list(empty.iterdir()) == []
