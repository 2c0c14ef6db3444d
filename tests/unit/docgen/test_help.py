"""Every command has a page and a manual page, with each of its options and examples."""

import shutil
import subprocess
from pathlib import Path

import click

from docgen import command_pages, man
from docgen.help import Help, Option, groups
from onecopy.cli import onecopy
from tests.conftest import cannot_run


def _commands() -> dict[str, click.Command]:
    """Words of the command line -> command, as click has them."""
    found: dict[str, click.Command] = {}

    def add(path: str, command: click.Command) -> None:
        found[path] = command
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                child = command.get_command(context, name)
                assert child
                add(f"{path} {name}", child)

    add("onecopy", onecopy)
    found.pop("onecopy")
    return found


def _generated() -> dict[str, Help]:
    return {each.path: each for found in groups().values() for top in found for each in top.all()}


def test_every_command_is_there() -> None:
    assert _generated().keys() == _commands().keys()


def test_every_option_is_on_the_page() -> None:
    pages = command_pages.pages()
    for path, command in _commands().items():
        page = pages[f"reference/commands/{path.split()[1]}.md"]
        options = [each for each in command.params if isinstance(each, click.Option)]
        for option in options:
            assert option.hidden or option.opts[-1] in page, (path, option.opts)
        assert path in page


def test_pages_show_what_markdown_would_obey() -> None:
    assert command_pages.cell("1<=x, A|B, a_b, [x] `A|B` --low-up") == (
        "1&lt;=x, A\\|B, a\\_b, \\[x\\] `A|B` `--low-up`"
    )


def test_manual_pages_render(tmp_path: Path) -> None:
    if not shutil.which("man"):
        cannot_run("there is no man")
    paths = man.write_all(tmp_path)
    assert {path.stem for path in paths} == {
        "onecopy",
        *(path.replace(" ", "-") for path in _commands()),
    }
    for path in paths:
        argv = ["man", "--warnings", "--local-file", str(path)]
        done = subprocess.run(argv, capture_output=True, text=True, env={"MANWIDTH": "100"})
        assert (done.returncode, done.stderr) == (0, ""), path.name
        assert done.stdout.strip(), path.name


def test_manual_pages_show_text_as_it_is(tmp_path: Path) -> None:
    if not shutil.which("man"):
        cannot_run("there is no man")
    text = r"'quoted .dots \back -n ~x ^y `bold`"
    examples = (("onecopy it -n 4", ".hidden"),)
    option = Option("--it [a|b]", text, "Options")
    page = Help("onecopy it", "[OPTIONS]", "Do it.", (text, "\b\n.as\n  is"), (option,), examples)
    path = tmp_path / "onecopy-it.1"
    path.write_text(man.render(page))
    done = subprocess.run(
        ["man", "--warnings", "--local-file", path],
        capture_output=True,
        text=True,
        env={"MANWIDTH": "100", "LC_ALL": "C.UTF-8"},
    )
    assert done.stderr == ""
    for line in (r"'quoted .dots \back -n ~x ^y bold", ".as", "  is", "--it [a|b]", ".hidden"):
        assert line in done.stdout, done.stdout
