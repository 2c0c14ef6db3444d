"""onecopy attach"""

from __future__ import annotations

import click

from onecopy.cli.commands import Command
from onecopy.cli.event_loop import asyncio
from onecopy.cli.params import AttachType, GuestType
from onecopy.model import Reference


@click.command(
    "attach",
    cls=Command,
    examples=[
        ("onecopy attach web notes:/srv/notes", "Mount the segment notes in the guest web."),
        (
            "onecopy attach --exclusive web notes:1.2:/srv/notes",
            "Give web a writable copy of version 1.2.",
        ),
    ],
)
@click.argument("guest", type=GuestType())
@click.argument("segment", type=AttachType(), metavar="SEGMENT[:/MOUNTPOINT]")
@click.option(
    "--exclusive",
    is_flag=True,
    help="Give the guest a copy-on-write copy of a segment that others only read. `onecopy commit` "
    "stores its changes.",
)
def command(guest: str, segment: tuple[Reference, str], exclusive: bool) -> None:
    """Load a segment into a running guest.

    With /MOUNTPOINT the guest mounts the segment. Without it the segment is the device
    /dev/onecopy/NAME. QEMU cannot unplug memory: the guest keeps the device and the lease until it
    ends.
    """
    from onecopy.guest.runtime import Runtime
    from onecopy.guest.segments.attach import attach

    ref, mountpoint = segment
    item = asyncio.run(attach(Runtime.open(), guest, ref, mountpoint, exclusive=exclusive))
    classes = " ".join(device.page_class for device in item.devices)
    print(f"{item.ref} ({classes}) is {item.mountpoint or f'/dev/onecopy/{item.name}'} in {guest}")
