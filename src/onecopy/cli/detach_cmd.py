"""onecopy detach"""

import asyncio

import click

from onecopy.cli.params import GuestType


@click.command("detach")
@click.argument("guest", type=GuestType())
@click.argument("segment", metavar="SEGMENT")
def command(guest: str, segment: str) -> None:
    """Unload a segment from a running guest: unmount it, or say which process holds it.

    QEMU cannot take memory away: the guest keeps the device, which is used again when the segment
    comes back, and its lease, until it ends.
    """
    from onecopy.guest.runtime import Runtime
    from onecopy.guest.segments.attach import detach

    item = asyncio.run(detach(Runtime.open(), guest, segment))
    print(f"{item.ref} is unloaded; {guest} keeps its device, and the lease, until it ends")
