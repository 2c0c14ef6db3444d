"""onecopy logs"""

import contextlib
import sys
import time

import click

from onecopy.cli.params import GuestType


@click.command("logs")
@click.argument("guest", type=GuestType())
@click.option(
    "-f", "--follow", is_flag=True, help="Go on showing what comes, until the guest ends."
)
@click.option("--qemu", is_flag=True, help="What QEMU itself printed, in place of the console.")
def command(guest: str, follow: bool, qemu: bool) -> None:
    """Show what a guest's console, and QEMU, have printed.

    The newest few MiB of it are kept.
    """
    from onecopy.guest.host import Host
    from onecopy.vmm import logs

    host = Host.open()
    folder = host.guest(guest)
    log = logs.Log(folder.path, logs.QEMU if qemu else logs.CONSOLE)
    if log.was_cut:
        click.echo("(older lines were dropped)", err=True)
    with contextlib.closing(log):
        while True:
            for data in log.read():
                sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            if not follow or not host.store.is_held(guest):
                return
            host.keep_logging(folder)
            time.sleep(0.2)
