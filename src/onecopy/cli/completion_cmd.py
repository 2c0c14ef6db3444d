"""onecopy completion"""

import click

from onecopy.cli.commands import Command


@click.command(
    "completion",
    cls=Command,
    examples=[
        ('eval "$(onecopy completion bash)"', "Complete in this bash; add the line to ~/.bashrc."),
        (
            "onecopy completion fish >~/.config/fish/completions/onecopy.fish",
            "Complete in each fish.",
        ),
    ],
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), metavar="SHELL")
def command(shell: str) -> None:
    """Print the completion script for a shell.

    SHELL is bash, zsh or fish. The script completes commands, options, guests, references and
    paths.
    """
    from click.shell_completion import get_completion_class

    from onecopy.cli import bash_completion, onecopy

    bash_completion.register()
    found = get_completion_class(shell)
    if found is not None:
        print(found(onecopy, {}, "onecopy", "_ONECOPY_COMPLETE").source())
