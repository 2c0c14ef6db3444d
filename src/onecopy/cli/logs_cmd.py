"""onecopy logs"""

from __future__ import annotations

import codecs
import contextlib
import io
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from onecopy.cli.commands import Command
from onecopy.cli.output import print_line
from onecopy.cli.params import GuestType
from onecopy.errors import NotFound

if TYPE_CHECKING:
    from onecopy.guest.run_directory import RunDirectory
    from onecopy.guest.runtime import Runtime
    from onecopy.vmm.logs import Log


@click.command(
    "logs",
    cls=Command,
    examples=[
        ("onecopy logs --follow web", "Print the console until the guest ends."),
        ("onecopy logs --qemu web", "Print the messages of the guest's QEMU."),
    ],
)
@click.argument("guest", type=GuestType(ended=True))
@click.option("-f", "--follow", is_flag=True, help="Keep printing new output until the guest ends.")
@click.option("--qemu", is_flag=True, help="Print the output of QEMU instead of the console.")
@click.option(
    "--raw", is_flag=True, help="Print control characters unchanged. Default: as escapes (\\x1b)."
)
def command(guest: str, follow: bool, qemu: bool, raw: bool) -> None:
    """Print the output of a guest's console or of its QEMU.

    onecopy keeps the newest few MiB. Of a guest that ended by itself it keeps the last 64 KiB; why
    the guest ended is printed on standard error.
    """
    from onecopy.guest.runtime import Runtime
    from onecopy.vmm import logs

    host = Runtime.open()
    write = _as_it_is if raw else _printer()
    log, folder = _open_log(host, guest, logs.QEMU if qemu else logs.CONSOLE)
    if log.was_cut:
        print_line("onecopy: older lines were dropped", sys.stderr)
    with contextlib.closing(log):
        while True:
            for data in log.read():
                write(data, False)
            sys.stdout.flush()
            if not follow or not folder or not host.store.is_held(guest):
                write(b"", True)
                return
            host.keep_logging(folder)
            time.sleep(0.2)


def _open_log(host: Runtime, guest: str, name: str) -> tuple[Log, RunDirectory | None]:
    """Open a guest's log; return it with the guest's directory, or None if the guest has ended."""
    from onecopy.guest import ended_guests
    from onecopy.guest.run_directory import no_guest
    from onecopy.vmm.logs import Log

    try:
        folder = host.guest(guest)
        return Log(folder.path, name), folder
    except (NotFound, FileNotFoundError) as error:
        record = ended_guests.find(host.run, guest)
        if not record or not record.ended:
            raise error if isinstance(error, NotFound) else no_guest(guest) from error
        print_line(f"onecopy: {guest} has ended: {record.ended.reason}", sys.stderr)
        return Log(ended_guests.path(host.run, guest), name), None


def _as_it_is(data: bytes, _: bool) -> None:
    sys.stdout.buffer.write(data)


def _printer() -> Callable[[bytes, bool], None]:
    """Return a function that prints bytes as text; its second argument marks the last bytes.

    Lines may end with a carriage return, as on a serial line.
    """
    decoder = io.IncrementalNewlineDecoder(
        codecs.getincrementaldecoder("utf-8")("surrogateescape"), translate=True
    )

    def write(data: bytes, last: bool) -> None:
        sys.stdout.write(decoder.decode(data, last))

    return write
