"""onecopy completion"""

import click


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script of a shell.

    bash: eval "$(onecopy completion bash)"
    """
    from click.shell_completion import get_completion_class

    from onecopy.cli import onecopy

    found = get_completion_class(shell)
    if found is not None:
        print(found(onecopy, {}, "onecopy", "_ONECOPY_COMPLETE").source())
