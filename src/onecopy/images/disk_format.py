"""What a disk image is: its format, told by its head, and whether it is one whole file.

An image can name other files of this host, in its head, and QEMU would open them. So nothing is
opened by such a name: the format is told here, and `qemu-img` is confined, reads an open
descriptor, and is told the driver. Not here: what the disk holds (partitions.py).
"""

from __future__ import annotations

import os
import re
import struct

import msgspec

from onecopy.errors import BadSource, CommandFailed
from onecopy.model import format_size
from onecopy.vmm.confined_tool import READ_ANY, Limits, Task, named, run_tool
from onecopy.vmm.passed_files import READ

#: What to do about what cannot be read here.
OPEN_HINT = "open it on this host (cryptsetup, vgchange, mdadm), mount it, build from dir:PATH"
#: Why something may be unreadable.
DAMAGED = "the image may be truncated or damaged"
#: QEMU's name of a format -> where its magic is, and the magic.
_MAGICS = {
    "qcow2": (0, b"QFI\xfb"),
    "qed": (0, b"QED\0"),
    "vhdx": (0, b"vhdxfile"),
    "vpc": (0, b"conectix"),
    "vdi": (64, b"\x7f\x10\xda\xbe"),
    "vmdk": (0, b"KDMV"),
    "luks": (0, b"LUKS\xba\xbe"),
}
#: Formats that are lists of other files, or that QEMU reads but that nobody has asked for.
_REFUSED = {
    b"# Disk DescriptorFile": "a list of other files (VMDK)",
    b"COWD": "a VMDK of ESX",
    b"WithoutFreeSpace": "a Parallels disk",
    b"WithouFreSpacExt": "a Parallels disk",
    b"Bochs Virtual HD Image": "a Bochs disk",
}
_ALONE_HINT = "make it one: qemu-img convert -O qcow2 FILE NEW-FILE"
#: Bytes of a disk, at most: an overlay can have no more.
_LARGEST = 1 << 50
_LIMITS = Limits(seconds=600, memory=2 << 30, processes=16, files=256)


class DiskFormat(msgspec.Struct, frozen=True):
    """What an image is."""

    driver: str
    """QEMU's."""
    size: int
    """Bytes of the disk."""


class _Info(msgspec.Struct, frozen=True, rename="kebab"):
    """What is used of `qemu-img info --output=json`."""

    virtual_size: int
    encrypted: bool = False
    backing_filename: str = ""
    full_backing_filename: str = ""


def find_format(fd: int) -> DiskFormat:
    """What the image that is open as ``fd`` is.

    Raises BadSource (damaged, encrypted, needs other files), MissingProgram, Incompatible.
    """
    head = os.pread(fd, 4096, 0).ljust(4096, b"\0")
    driver, size = _driver(head), os.fstat(fd).st_size
    if driver == "vdi" and _vdi_end(head) > size:
        raise BadSource("it is truncated", hint=DAMAGED)
    if driver != "raw":
        try:
            size = _ask(fd, driver)
            _check(fd, driver)
        except CommandFailed as error:
            text = re.sub(r"'json:[^']*'", "it", said(error))
            raise BadSource(text, hint=f"{DAMAGED}; `qemu-img check` tells more") from error
    if size > _LARGEST:
        raise BadSource(
            f"it is {format_size(size)}, and can be {format_size(_LARGEST)} at most", hint=DAMAGED
        )
    return DiskFormat(driver, size)


def _driver(head: bytes) -> str:
    """QEMU's driver for an image with that head; raise BadSource if it is not one file."""
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            raise _not_alone(f"it is {what}")
    found = next((d for d, (at, m) in _MAGICS.items() if head[at:].startswith(m)), "raw")
    if found == "luks":
        raise _encrypted()
    _ALONE.get(found, lambda _: None)(head)
    return found


def _qcow2(head: bytes) -> None:
    # QEMU docs/interop/qcow2.txt.
    version, backing = struct.unpack_from(">IQ", head, 4)
    (method,) = struct.unpack_from(">I", head, 32)
    (features,) = struct.unpack_from(">Q", head, 72)
    if backing:
        raise _not_alone("it needs a backing file")
    if version >= 3 and features & 1 << 2:
        raise _not_alone("it needs a data file")
    if method:
        raise _encrypted()


def _qed(head: bytes) -> None:
    # QEMU docs/interop/qed_spec.rst: the first feature.
    if struct.unpack_from("<Q", head, 16)[0] & 1:
        raise _not_alone("it needs a backing file")


def _vmdk(head: bytes) -> None:
    # struct VMDK4Header of QEMU's block/vmdk.c: without a capacity it is a list of other files.
    if not struct.unpack_from("<Q", head, 12)[0]:
        raise _not_alone("it is a list of other files (VMDK)")


def _vpc(head: bytes) -> None:
    # struct VHDFooter of QEMU's block/vpc.c.
    if struct.unpack_from(">I", head, 60)[0] == 4:
        raise _not_alone("it needs a parent (a differencing VHD)")


def _vdi_end(head: bytes) -> int:
    """Bytes that the file has: QEMU does not look (struct VdiHeader of its block/vdi.c)."""
    (data,) = struct.unpack_from("<I", head, 0x158)
    block, _, _, allocated = struct.unpack_from("<4I", head, 0x178)
    return int(data + block * allocated)


_ALONE = {"qcow2": _qcow2, "qed": _qed, "vmdk": _vmdk, "vpc": _vpc}


def _ask(fd: int, driver: str) -> int:
    """Bytes of the disk; raise BadSource, CommandFailed."""
    info = msgspec.json.decode(_qemu_img("info", fd, driver, "--output=json"), type=_Info)
    other = info.full_backing_filename or info.backing_filename
    if other:
        raise _not_alone(f"it needs {other!a}")
    if info.encrypted:
        raise _encrypted()
    return info.virtual_size


def _check(fd: int, driver: str) -> None:
    """Raise CommandFailed for an image that is not whole: what is cut off would read as zeroes."""
    # 3: only clusters that nothing refers to; 63: it cannot be checked (qemu-img(1)).
    _qemu_img("check", fd, driver, "-q", fine=(0, 3, 63))


def _qemu_img(
    command: str, fd: int, driver: str, *options: str, fine: tuple[int, ...] = (0,)
) -> str:
    file = {"driver": "file", "filename": named(fd), "locking": "off"}
    node: dict[str, object] = {"driver": driver, "file": file}
    if driver in ("qcow2", "qed", "vmdk"):
        node["backing"] = None
    name = "json:" + msgspec.json.encode(node).decode()
    task = Task(
        ["qemu-img", command, *options, name], {fd: READ}, capabilities=READ_ANY, limits=_LIMITS
    )
    return run_tool(task, fine=fine).out


def _not_alone(why: str) -> BadSource:
    return BadSource(f"an image must be one file, and {why}", hint=_ALONE_HINT)


def _encrypted() -> BadSource:
    return BadSource("it is encrypted (LUKS)", hint=OPEN_HINT)


def said(error: CommandFailed) -> str:
    """The end of what a program said that failed."""
    return "\n".join(error.output.strip().splitlines()[-8:]) or error.message
