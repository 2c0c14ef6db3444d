"""The docs site builds strictly, and a broken link, anchor or source file fails."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import cannot_run

PROJECT = Path(__file__).parents[3]
#: What the site is made of.
PARTS = ("docs", "docgen", "src", "tests/README.md", "examples", "vmtest", "benchmarks")


def build(project: Path, site: Path) -> subprocess.CompletedProcess[str]:
    if not importlib.util.find_spec("material"):
        cannot_run("MkDocs Material is not installed: script/bootstrap --docs")
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(argv, cwd=project, capture_output=True, text=True, timeout=600)


def test_the_site_builds(tmp_path: Path) -> None:
    done = build(PROJECT, tmp_path)
    assert done.returncode == 0, done.stderr
    for page in ("index", "tutorial", "reference/commands/run", "reference/exit-codes"):
        assert (tmp_path / f"{page}.html").stat().st_size > 5000
    # No host is asked for anything when a page is read.
    text = (tmp_path / "index.html").read_text()
    assert 'src="https:' not in text and 'rel="stylesheet" href="https:' not in text


def test_a_broken_link_fails(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for path in PROJECT.iterdir():
        if path.name not in ("docs", ".git", "out", ".cache"):
            (project / path.name).symlink_to(path)
    shutil.copytree(PROJECT / "docs", project / "docs")
    page = project / "docs/limits.md"
    page.write_text(
        page.read_text() + "[a](nothing.md) [b](security.md#nothing) [c](reference/commands/no.md)"
    )
    (project / "docs/forgotten.md").write_text("# In no navigation\n")
    done = build(project, tmp_path / "site")
    assert done.returncode != 0
    for told in ("'nothing.md'", "#nothing", "commands/no.md", "forgotten.md"):
        assert told in done.stderr, (told, done.stderr)


def test_a_link_to_a_missing_source_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    if not importlib.util.find_spec("material"):
        cannot_run("MkDocs Material is not installed: script/bootstrap --docs")
    from types import SimpleNamespace
    from typing import Any, cast

    from mkdocs.exceptions import PluginError

    from docgen import site

    page = cast(Any, SimpleNamespace(file=SimpleNamespace(src_uri="guides/a.md")))
    config = cast(Any, SimpleNamespace(repo_url="https://example.org/it/"))
    files = cast(Any, None)

    def shown(text: str) -> str:
        return site.on_page_markdown(text, page=page, config=config, files=files)

    assert shown("[a](b.md) [c](../d.md#e)") == "[a](b.md) [c](../d.md#e)"
    assert shown("[a](../../src/onecopy/cli#x)") == (
        "[a](https://example.org/it/tree/main/src/onecopy/cli#x)"
    )
    with pytest.raises(PluginError, match="src/nothing"):
        shown("[a](../../src/nothing.py)")
