"""onecopy attach"""

from __future__ import annotations

import asyncio

import click

from onecopy.cli.params import AttachType, GuestType
from onecopy.model import Reference


@click.command("attach")
@click.argument("guest", type=GuestType())
@click.argument("segment", type=AttachType(), metavar="SEGMENT[:/MOUNTPOINT]")
@click.option(
    "--exclusive",
    is_flag=True,
    help="A copy of the guest's own, to write to, of what others only read; see `onecopy commit`.",
)
def command(guest: str, segment: tuple[Reference, str], exclusive: bool) -> None:
    """Load a segment into a running guest: mounted, or as the device /dev/onecopy/NAME.

    QEMU cannot take memory away: the guest keeps the device, and the lease, until it ends.
    """
    from onecopy.guest.runtime import Runtime
    from onecopy.guest.segments.attach import attach

    ref, mountpoint = segment
    item = asyncio.run(attach(Runtime.open(), guest, ref, mountpoint, exclusive=exclusive))
    classes = " ".join(device.page_class for device in item.devices)
    print(f"{item.ref} ({classes}) is {item.mountpoint or f'/dev/onecopy/{item.name}'} in {guest}")
