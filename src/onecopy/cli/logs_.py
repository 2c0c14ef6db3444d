"""onecopy logs"""

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
    """Show what a guest's console, and QEMU, have printed."""
    from onecopy.guest.host import Host

    host = Host.open()
    folder = host.guest(guest)
    with (folder.path / ("qemu.log" if qemu else "console.log")).open("rb") as log:
        while True:
            while data := log.read(1 << 16):
                sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            if not follow or not host.store.is_held(guest):
                return
            time.sleep(0.2)
