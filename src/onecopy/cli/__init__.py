"""The command line: one file per command, no logic.

Not here: the list of commands and their classes (commands.py).
"""

from __future__ import annotations

import errno
import os
import signal
import sys

import click

from onecopy import __version__
from onecopy.cli import streams
from onecopy.cli.commands import COMMANDS as COMMANDS
from onecopy.cli.commands import Main
from onecopy.cli.output import debugging, escaping, show_place, tell_error
from onecopy.errors import Interrupted, InvalidInput, OutputFailed

#: Commands that exit with the code of a program in the guest; failures of onecopy exit with 125.
_PASSING = ("exec",)
PASSED_FAILURE = 125
#: The environment variable that a shell sets in a request for completions.
_COMPLETE = "_ONECOPY_COMPLETE"
#: 128 + SIGPIPE: the exit code in a shell of a program whose reader has left.
READER_GONE = 141


@click.group(
    cls=Main,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    examples=[
        ("onecopy build python --from debian:bookworm --include python3", "Build a root segment."),
        ("onecopy save hello --root python", "Boot it, and save the guest."),
        ("onecopy run --count 4 --name web hello", "Start four clones: web-1 to web-4."),
    ],
)
@click.option(
    "--debug",
    is_flag=True,
    help="Write steps, programs that run and QMP messages to standard error, and where errors "
    "arise. ONECOPY_DEBUG=1 does the same.",
)
@click.version_option(__version__, message="onecopy %(version)s")
@click.pass_context
def onecopy(context: click.Context, debug: bool) -> None:
    """Run many similar QEMU/KVM guests on one copy of memory.

    A reference to a segment, saved system or kernel is NAME[:VERSION] or NAME@sha256:DIGEST.
    `onecopy COMMAND --help` explains a command.
    """
    if debug or debugging():
        from onecopy.cli.debug import enable

        enable()
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(InvalidInput.exit_code)


def main(args: list[str] | None = None) -> int:
    """Run one command, and return its exit code; never raise."""
    streams.secure()
    with escaping():
        return _main(sys.argv[1:] if args is None else args)


def _main(args: list[str]) -> int:
    _end_politely()
    code = _run(args)
    try:
        streams.finish()
    except OutputFailed as error:
        return _fail_output(args, error, code)
    return code


def _run(args: list[str]) -> int:
    try:
        if _COMPLETE in os.environ:
            from onecopy.cli import bash_completion

            bash_completion.register()
        result = onecopy.main(args, prog_name="onecopy", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        from onecopy.cli.usage import explained

        return _fail(args, explained(error))
    except (click.Abort, KeyboardInterrupt):
        return _fail(args, Interrupted())
    except OutputFailed as error:
        return _fail_output(args, error)
    except Exception as error:
        return _fail(args, error)


def _fail_output(args: list[str], error: OutputFailed, code: int = 0) -> int:
    """Return the exit code if output cannot be written; ``code`` is that of an earlier failure."""
    streams.give_up()
    if error.errno == errno.EPIPE:
        # The reader left early: print nothing, like programs that SIGPIPE ends.
        return code or READER_GONE
    return _fail(args, error)


def _end_politely() -> None:
    """Let SIGTERM and SIGHUP undo the command's work, as Ctrl-C does."""
    # A shell without job control starts "command &" with SIGINT ignored, and Python keeps it so.
    # SIGTERM is forwarded as SIGINT and would be lost.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup(1) sets SIGHUP to be ignored, and that must stay.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))


def _fail(args: list[str], found: Exception) -> int:
    from onecopy.cli.failures import explained

    error = explained(found)
    show_place(found)
    tell_error(error)
    return _code(args, error.exit_code)


def _code(args: list[str], code: int) -> int:
    # Options of onecopy itself, which take no values, stand before the command.
    command = next((word for word in args if not word.startswith("-")), "")
    passing = command in _PASSING and code != Interrupted.exit_code
    return PASSED_FAILURE if passing else code
