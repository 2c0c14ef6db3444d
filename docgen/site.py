"""The hooks of `mkdocs build` (mkdocs.yml): generated pages, and links into the sources."""

from __future__ import annotations

import posixpath
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PROJECT = Path(__file__).parents[1]
sys.path.insert(0, str(PROJECT))

from docgen import command_pages, exit_codes, json_schemas, python_api  # noqa: E402

#: Pages that are files outside docs/, where developers look for them.
COPIED = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "tests.md": "tests/README.md",
}
#: The entry of the navigation that the pages of the commands replace.
_COMMANDS = command_pages.PLACE
_LINK = re.compile(r"(\]\()([^)\s:#]+)((?:#[^)\s]*)?\))")


def generated() -> dict[str, str]:
    """Return path -> content of all pages and files that a build generates."""
    copied = {page: _copied(source) for page, source in COPIED.items()}
    return {
        **command_pages.pages(),
        **json_schemas.files(),
        "reference/exit-codes.md": exit_codes.page(),
        "reference/python.md": python_api.page(),
        **copied,
    }


def _copied(source: str) -> str:
    """Return a file of the project, with its links rewritten to start at docs/."""
    place = posixpath.dirname(source)

    def moved(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(place, match[2]))
        pages = {kept: page for page, kept in COPIED.items()}
        inside = path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"
        return match[1] + pages.get(path, inside) + match[3]

    return _LINK.sub(moved, (PROJECT / source).read_text())


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set the repository's address from pyproject.toml, and add the commands to the navigation."""
    with (PROJECT / "pyproject.toml").open("rb") as file:
        urls = tomllib.load(file)["project"]["urls"]
    config.repo_url, config.repo_name = urls["Repository"], "Repository"
    config.nav = _with_commands(config.nav)
    return config


def _with_commands(entry: Any) -> Any:
    if isinstance(entry, list):
        return [_with_commands(each) for each in entry]
    if isinstance(entry, dict):
        return {title: _with_commands(each) for title, each in entry.items()}
    return command_pages.navigation() if entry == _COMMANDS else entry


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages and files."""
    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links to files of the project as links into the repository.

    Raises:
        PluginError: A link leads to no file.
    """
    place = posixpath.dirname(page.file.src_uri)

    def linked(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", place, match[2]))
        if path.startswith("docs/") or not match[2].startswith("../"):
            return match[0]
        if not (PROJECT / path).exists():
            raise PluginError(f"{page.file.src_uri} links to {path}, which does not exist")
        kind = "tree" if (PROJECT / path).is_dir() else "blob"
        return f"{match[1]}{(config.repo_url or '').rstrip('/')}/{kind}/main/{path}{match[3]}"

    return _LINK.sub(linked, markdown)
