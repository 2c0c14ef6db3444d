"""Makes segments for the tests of running guests, and reads and writes their devices.

All access bypasses the guests' page caches (O_DIRECT).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from onecopy.guest.run_directory import Attached, GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.guest.segments.attach import attach, detach
from onecopy.images.create import NewRange, create_segment
from onecopy.model import HUGE_PAGE_SIZE, PAGE_SIZE, PageClass, Reference
from onecopy.store import Artifact
from tests.vm.conftest import RunIn

#: What a range with stored content starts with.
CONTENT = b"stored content"
SIZE = HUGE_PAGE_SIZE


def make(host: Runtime, folder: Path, name: str, *classes: PageClass) -> Artifact:
    """A segment of one range for each class, each with ``CONTENT`` if it can have any."""
    folder.mkdir(exist_ok=True)
    file = folder / "content"
    file.write_bytes(CONTENT)
    ranges = [NewRange(each, SIZE, file if each.saved else None) for each in classes]
    return create_segment(host.store, Reference.parse(name), ranges)


def load(host: Runtime, guest: GuestRecord, what: str, *, exclusive: bool = False) -> Attached:
    """Attach ``NAME[:VERSION][:/MOUNTPOINT]``."""
    ref, colon, mountpoint = what.partition(":/")
    where = f"/{mountpoint}" if colon else ""
    return asyncio.run(attach(host, guest.name, Reference.parse(ref), where, exclusive=exclusive))


def unload(host: Runtime, guest: GuestRecord, name: str) -> Attached:
    """Detach."""
    return asyncio.run(detach(host, guest.name, name))


def read(run_in: RunIn, guest: GuestRecord, device: str, count: int = 14, page: int = 0) -> bytes:
    """The first bytes of a page of /dev/onecopy/``device``."""
    script = 'dd if="$0" iflag=direct bs=4096 skip="$1" count=1 2>/dev/null | head -c "$2"'
    done = run_in(guest, "sh", "-c", script, f"/dev/onecopy/{device}", str(page), str(count))
    assert done.exit_code == 0, done.stderr
    return done.stdout


def write(run_in: RunIn, guest: GuestRecord, device: str, text: str, page: int = 0) -> None:
    """Write to a page, whatever the guest thinks of it: what is read-only is made writable first.

    Not flushed: a clone's virtio-pmem never ends a flush of what was there when it was saved.
    """
    script = (
        'd=$(readlink "$0"); blockdev --setrw "$d"; '
        'printf %s "$2" | dd of="$d" oflag=direct conv=sync,notrunc bs=4096 seek="$1" 2>/dev/null'
    )
    done = run_in(guest, "sh", "-c", script, f"/dev/onecopy/{device}", str(page), text)
    assert done.exit_code == 0, done.stderr


def record(host: Runtime, guest: GuestRecord) -> GuestRecord:
    """What the host has on record of a guest now."""
    return host.guest(guest.name).record()


ZEROES = bytes(len(CONTENT))
assert PAGE_SIZE == 4096
