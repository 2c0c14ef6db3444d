"""onecopy detach"""

import click

from onecopy.cli.commands import Command
from onecopy.cli.event_loop import asyncio
from onecopy.cli.params import GuestType, LoadedType


@click.command(
    "detach",
    cls=Command,
    examples=[
        ("onecopy detach web notes", "Unmount the segment notes in the guest web."),
        ("onecopy attach web notes:/srv/notes", "Load it again, at the same device."),
    ],
)
@click.argument("guest", type=GuestType())
@click.argument("segment", type=LoadedType(), metavar="SEGMENT")
def command(guest: str, segment: str) -> None:
    """Unload a segment from a running guest.

    The guest unmounts the segment. If a process holds it, the command fails and names the process.
    QEMU cannot unplug memory: the guest keeps the device and the lease until it ends.
    """
    from onecopy.guest.runtime import Runtime
    from onecopy.guest.segments.attach import detach

    item = asyncio.run(detach(Runtime.open(), guest, segment))
    print(f"{item.ref} is unloaded; {guest} keeps its device, and the lease, until it ends")
