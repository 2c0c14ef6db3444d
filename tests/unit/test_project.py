"""The project's own files: metadata, changelog, commit checks, and what they promise."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from onecopy import __version__
from tests.conftest import cannot_run

PROJECT = Path(__file__).parents[2]


def _pyproject() -> dict[str, Any]:
    with (PROJECT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def _module(name: str, *args: str, cwd: Path) -> str:
    if not importlib.util.find_spec(name):
        cannot_run(f"{name} is not installed: script/bootstrap --docs")
    argv = [sys.executable, "-m", name, *args]
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_metadata_is_whole() -> None:
    project = _pyproject()["project"]
    for key in ("description", "readme", "license", "authors", "keywords", "classifiers", "urls"):
        assert project[key], key
    for path in (project["readme"], *project["license-files"]):
        assert (PROJECT / path).stat().st_size > 1000


def test_the_repository_s_address_stands_in_one_place() -> None:
    address = _pyproject()["project"]["urls"]["Repository"].partition("//")[2]
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True)
    if tracked.returncode:
        cannot_run("this is no git checkout")
    names = [PROJECT / name for name in tracked.stdout.decode().split("\0") if name]
    found = [path for path in names if path.is_file() and address.encode() in path.read_bytes()]
    assert [path.name for path in found] == ["pyproject.toml"]


def test_the_changelog_has_this_version() -> None:
    text = (PROJECT / "CHANGELOG.md").read_text()
    mark = _pyproject()["tool"]["towncrier"]["start_string"]
    assert text.count(mark) == 1
    newest = re.search(r"^## (\S+)", text.partition(mark)[2], re.MULTILINE)
    assert newest and newest[1] == __version__


def test_fragments_come_into_the_changelog(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(PROJECT / name, tmp_path)
    (tmp_path / "changelog.d").mkdir()
    (tmp_path / "changelog.d/+sort.changed.md").write_text("`onecopy ls` sorts by number.\n")
    _module("towncrier", "build", "--keep", "--version", "99.0", cwd=tmp_path)
    text = (tmp_path / "CHANGELOG.md").read_text()
    new, _, old = text.partition("\n## 0.1.0")
    assert "## 99.0" in new and "### Changed" in new and "`onecopy ls` sorts by number." in new
    assert old == (PROJECT / "CHANGELOG.md").read_text().partition("\n## 0.1.0")[2]


def test_every_fragment_is_of_a_known_kind() -> None:
    kinds = {each["directory"] for each in _pyproject()["tool"]["towncrier"]["type"]}
    for path in (PROJECT / "changelog.d").iterdir():
        if path.name != "README.md":
            assert re.fullmatch(r"\+[\w-]+\.(\w+)\.md", path.name), path.name
            assert path.name.split(".")[1] in kinds, path.name


def test_checks_before_a_commit_are_valid() -> None:
    _module("pre_commit", "validate-config", cwd=PROJECT)


@pytest.mark.parametrize("script", ["bootstrap", "package", "test-package"])
def test_scripts_parse(script: str) -> None:
    done = subprocess.run(["bash", "-n", PROJECT / "script" / script], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
