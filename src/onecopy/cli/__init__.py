"""The command line: one file per command, no logic.

Commands are imported only when they are used, so that `onecopy --help` is instant; _COMMANDS has
their one-line helps (a test holds them equal to the commands' own).
"""

from __future__ import annotations

import errno
import importlib
import signal
import sys

import click

from onecopy import __version__
from onecopy.cli import streams
from onecopy.cli.output import escaping, show_place, tell_error
from onecopy.errors import Interrupted, OutputFailed

_COMMANDS = {
    "build": "Build a segment from Debian packages, a folder, a tar archive or a disk image.",
    "create": "Make a segment range by range.",
    "save": "Save a guest as a system: one that is booted for it and is ready, or one that runs.",
    "run": "Start guests from a saved system, or boot them cold.",
    "pool": "Keep SIZE guests of SYSTEM prepared, so that `run` starts them faster; 0 for none.",
    "ps": "List the running guests.",
    "exec": "Run a program in a guest.",
    "cp": "Copy files and folders into a guest, or out of it; one of the two is GUEST:PATH.",
    "attach": "Load a segment into a running guest: mounted, or as the device /dev/onecopy/NAME.",
    "detach": "Unload a segment from a running guest: unmount it, or say which process holds it.",
    "commit": "Make what a guest has changed in its own copy of a segment (EW) the new version.",
    "serve": "Answer guests that ask for segments by name, until it is ended.",
    "console": "Connect the terminal to a guest's serial console.",
    "logs": "Show what a guest's console, and QEMU, have printed.",
    "stop": "Stop guests: ask, wait, end.",
    "ls": "List segments, saved systems and kernels.",
    "inspect": "Show all that is known of a segment, saved system, kernel or guest.",
    "verify": "Read segments or saved systems, compare their digests, check their file systems.",
    "warm": "Load segments, saved systems or kernels into memory before guests need them.",
    "tag": "Give a segment, saved system or kernel a further name or version.",
    "write": "Write standard input to an SC range of a segment; all guests see it at once.",
    "grant": "Restrict a segment or saved system to the guests named, also patterns such as web-*.",
    "revoke": "Take grants back: these guests cannot load the segment or saved system any more.",
    "rm": "Remove segments, saved systems, kernels, and guests that have ended.",
    "report": "Show what the memory of all guests costs, by the kernel's counters.",
    "top": "Show guests, what they share and KSM, live, until q is typed.",
    "advise": "Read the memory of guests, and say what they could share, and how.",
    "plan": "Say how much memory and time many clones of a saved system will take.",
    "ksm": "Show what KSM merges, turn it on, tune it, and put all back as it was found.",
    "disks": "List the disks of guests, or remove some.",
    "doctor": "Check what this host can do.",
    "demo": "Show it all: build, save, start guests cold and saved, compare.",
    "completion": "Print the completion script of a shell.",
}
#: Commands whose exit code is that of a program in the guest: ours is then always 125.
_PASSING = ("exec",)
PASSED_FAILURE = 125
#: 128 + SIGPIPE, as a shell has it of any program whose output is read no more.
READER_GONE = 141


class _Lazy(click.Group):
    """Loads a command's file when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"onecopy.cli.{cmd_name}_cmd")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="References are NAME[:VERSION] or NAME@sha256:... Exit codes: docs/exit-codes.md.",
)
@click.version_option(__version__, message="onecopy %(version)s")
def onecopy() -> None:
    """Hundreds of similar QEMU/KVM guests living off one copy of memory."""


def main(args: list[str] | None = None) -> int:
    """Run one command; return its exit code. Raises nothing, whatever happens."""
    streams.secure()
    with escaping():
        return _main(sys.argv[1:] if args is None else args)


def _main(args: list[str]) -> int:
    _end_politely()
    code = _run(args)
    try:
        streams.finish()
    except OutputFailed as error:
        return _lost(args, error, code)
    return code


def _run(args: list[str]) -> int:
    try:
        result = onecopy.main(args, prog_name="onecopy", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        error.show()
        return _code(args, error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail(args, Interrupted())
    except OutputFailed as error:
        return _lost(args, error)
    except Exception as error:
        return _fail(args, error)


def _lost(args: list[str], error: OutputFailed, code: int = 0) -> int:
    """What to return if output cannot be written; ``code`` is what else has failed."""
    streams.give_up()
    if error.errno == errno.EPIPE:
        # The reader has what it wanted: nothing is told, as when SIGPIPE ends other programs.
        return code or READER_GONE
    return _fail(args, error)


def _end_politely() -> None:
    """SIGTERM and SIGHUP undo what was begun, as Ctrl-C does."""
    # A shell without job control starts "command &" with SIGINT ignored, and Python leaves it so:
    # SIGTERM, which goes on as SIGINT, would be lost.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup(1) ignores SIGHUP, and means it.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))


def _fail(args: list[str], found: Exception) -> int:
    from onecopy.cli.failures import explained

    error = explained(found)
    show_place(found)
    tell_error(error)
    return _code(args, error.exit_code)


def _code(args: list[str], code: int) -> int:
    passing = bool(args) and args[0] in _PASSING and code != Interrupted.exit_code
    return PASSED_FAILURE if passing else code
