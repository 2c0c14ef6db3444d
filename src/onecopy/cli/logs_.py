"""onecopy logs"""

import codecs
import contextlib
import io
import sys
import time
from collections.abc import Callable

import click

from onecopy.cli.params import GuestType


@click.command("logs")
@click.argument("guest", type=GuestType())
@click.option(
    "-f", "--follow", is_flag=True, help="Go on showing what comes, until the guest ends."
)
@click.option("--qemu", is_flag=True, help="What QEMU itself printed, in place of the console.")
@click.option("--raw", is_flag=True, help="Print control characters as they are, not as escapes.")
def command(guest: str, follow: bool, qemu: bool, raw: bool) -> None:
    """Show what a guest's console, and QEMU, have printed.

    The newest few MiB of it are kept. A terminal obeys control characters, and a guest prints what
    it likes: without --raw they are shown as escapes, such as \\x1b.
    """
    from onecopy.guest.host import Host
    from onecopy.vmm import logs

    host = Host.open()
    folder = host.guest(guest)
    write = _as_it_is if raw else _shown()
    log = logs.Log(folder.path, logs.QEMU if qemu else logs.CONSOLE)
    if log.was_cut:
        click.echo("(older lines were dropped)", err=True)
    with contextlib.closing(log):
        while True:
            for data in log.read():
                write(data, False)
            sys.stdout.flush()
            if not follow or not host.store.is_held(guest):
                write(b"", True)
                return
            host.keep_logging(folder)
            time.sleep(0.2)


def _as_it_is(data: bytes, _: bool) -> None:
    sys.stdout.buffer.write(data)


def _shown() -> Callable[[bytes, bool], None]:
    """Writes bytes as text; ``True`` says that they are the last.

    A line may end as a serial line's does, with a carriage return.
    """
    decoder = io.IncrementalNewlineDecoder(
        codecs.getincrementaldecoder("utf-8")("surrogateescape"), translate=True
    )

    def write(data: bytes, last: bool) -> None:
        sys.stdout.write(decoder.decode(data, last))

    return write
