"""onecopy console"""

import select
import socket
import sys
import termios
import tty

import click

from onecopy.cli import streams
from onecopy.cli.commands import Command
from onecopy.cli.params import GuestType
from onecopy.errors import GuestFailed
from onecopy.vmm.sockets import CONSOLE

_ESCAPE = b"\x1d"  # Ctrl-]


@click.command(
    "console",
    cls=Command,
    examples=[
        ("onecopy console web", "Log in at the guest's console; Ctrl-] ends the connection."),
        ("echo poweroff | onecopy console web", "Type a line at it."),
    ],
)
@click.argument("guest", type=GuestType())
def command(guest: str) -> None:
    """Connect the terminal to a guest's serial console.

    Ctrl-] ends the connection. The guest keeps running.
    """
    from onecopy.guest.runtime import Runtime

    folder = Runtime.open().guest(guest)
    with socket.socket(socket.AF_UNIX) as console:
        try:
            console.connect(str(folder.path / CONSOLE))
        except OSError as error:
            raise GuestFailed(
                f"the console of {guest} cannot be reached: {error.strerror}",
                hint=f"`onecopy logs {guest}` shows what the console printed",
            ) from error
        if not sys.stdin.isatty():
            _copy(console)
            return
        print(f"connected to {guest}; Ctrl-] ends the connection", file=sys.stderr)
        before = termios.tcgetattr(0)
        try:
            tty.setraw(0)
            _copy(console)
        finally:
            termios.tcsetattr(0, termios.TCSADRAIN, before)
    print(file=sys.stderr)


def _copy(console: socket.socket) -> None:
    sources: list[socket.socket | int] = [console, 0]
    while True:
        ready, _, _ = select.select(sources, [], [])
        if console in ready:
            data = console.recv(1 << 16)
            if not data:
                return
            streams.put_all(1, data)
        if 0 in ready:
            data = streams.take(1 << 16)
            if not data:
                sources.remove(0)
            typed, escape, _ = data.partition(_ESCAPE)
            console.sendall(typed)
            if escape:
                return
