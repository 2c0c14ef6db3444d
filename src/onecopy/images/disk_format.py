"""Detects a disk image's format by its header, and checks that the image is one complete file.

An image header can name other files of this host, and QEMU would open them. Therefore this module
detects the format itself and names the driver. `qemu-img` runs confined and reads an open
descriptor. Not here: the content of the disk (partitions.py).
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

#: Hint for encrypted disks, LVM and RAID.
OPEN_HINT = "open it on this host (cryptsetup, vgchange, mdadm), mount it, and build from dir:PATH"
#: Hint for content that cannot be read.
DAMAGED = "the image may be truncated or damaged"
#: QEMU's driver -> offset of the format's magic, and the magic.
_MAGICS = {
    "qcow2": (0, b"QFI\xfb"),
    "qed": (0, b"QED\0"),
    "vhdx": (0, b"vhdxfile"),
    "vpc": (0, b"conectix"),
    "vdi": (64, b"\x7f\x10\xda\xbe"),
    "vmdk": (0, b"KDMV"),
    "luks": (0, b"LUKS\xba\xbe"),
}
#: Formats that reference other files, and formats that QEMU reads but onecopy does not support.
_REFUSED = {
    b"# Disk DescriptorFile": "a list of other files (VMDK)",
    b"COWD": "a VMDK of ESX",
    b"WithoutFreeSpace": "a Parallels disk",
    b"WithouFreSpacExt": "a Parallels disk",
    b"Bochs Virtual HD Image": "a Bochs disk",
}
_ONE_FILE_HINT = "convert it: qemu-img convert -O qcow2 FILE NEW-FILE"
#: The largest disk in bytes. The qcow2 overlay of the reader cannot be larger.
_MAX_SIZE = 1 << 50
_LIMITS = Limits(seconds=600, memory=2 << 30, processes=16, files=256)


class DiskFormat(msgspec.Struct, frozen=True):
    """The format of a disk image."""

    driver: str
    """QEMU's block driver."""
    size: int
    """Bytes of the virtual disk."""


class _Info(msgspec.Struct, frozen=True, rename="kebab"):
    """The fields read from `qemu-img info --output=json`."""

    virtual_size: int
    encrypted: bool = False
    backing_filename: str = ""
    full_backing_filename: str = ""


def find_format(fd: int) -> DiskFormat:
    """Detect the format of the image open as ``fd``.

    Raises:
        BadSource: The image is damaged, encrypted, too large, or needs other files.
        MissingProgram: qemu-img is not installed.
        Incompatible: This host cannot confine qemu-img.
    """
    head = os.pread(fd, 4096, 0).ljust(4096, b"\0")
    driver, size = _driver(head), os.fstat(fd).st_size
    if driver == "vdi" and (end := _vdi_end(head)) > size:
        raise BadSource(
            f"it is truncated: its header needs {end} bytes, the file has {size}", hint=DAMAGED
        )
    if driver != "raw":
        try:
            size = _virtual_size(fd, driver)
            _check(fd, driver)
        except CommandFailed as error:
            text = re.sub(r"'json:[^']*'", "it", said(error))
            raise BadSource(text, hint=f"{DAMAGED}: run `qemu-img check` on it") from error
    if size > _MAX_SIZE:
        raise BadSource(
            f"its disk size is {format_size(size)}; the limit is {format_size(_MAX_SIZE)}",
            hint=DAMAGED,
        )
    return DiskFormat(driver, size)


def _driver(head: bytes) -> str:
    """Return QEMU's driver for an image with that header; raise BadSource if refused."""
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            raise _not_one_file(f"it is {what}")
    found = next((d for d, (at, m) in _MAGICS.items() if head[at:].startswith(m)), "raw")
    if found == "luks":
        raise _encrypted()
    _HEADER_CHECKS.get(found, lambda _: None)(head)
    return found


def _check_qcow2(head: bytes) -> None:
    # QEMU docs/interop/qcow2.txt.
    version, backing = struct.unpack_from(">IQ", head, 4)
    (method,) = struct.unpack_from(">I", head, 32)
    (features,) = struct.unpack_from(">Q", head, 72)
    if backing:
        raise _not_one_file("it needs a backing file")
    if version >= 3 and features & 1 << 2:
        raise _not_one_file("it needs a data file")
    if method:
        raise _encrypted()


def _check_qed(head: bytes) -> None:
    # QEMU docs/interop/qed_spec.rst: the first feature bit is QED_F_BACKING_FILE.
    if struct.unpack_from("<Q", head, 16)[0] & 1:
        raise _not_one_file("it needs a backing file")


def _check_vmdk(head: bytes) -> None:
    # struct VMDK4Header in QEMU's block/vmdk.c: capacity 0 means a descriptor of other files.
    if not struct.unpack_from("<Q", head, 12)[0]:
        raise _not_one_file("it is a list of other files (VMDK)")


def _check_vpc(head: bytes) -> None:
    # struct VHDFooter in QEMU's block/vpc.c.
    if struct.unpack_from(">I", head, 60)[0] == 4:
        raise _not_one_file("it needs a parent (a differencing VHD)")


def _vdi_end(head: bytes) -> int:
    """Return the bytes that a complete VDI file has; QEMU does not check this.

    Source: struct VdiHeader in QEMU's block/vdi.c.
    """
    (data,) = struct.unpack_from("<I", head, 0x158)
    block, _, _, allocated = struct.unpack_from("<4I", head, 0x178)
    return int(data + block * allocated)


_HEADER_CHECKS = {
    "qcow2": _check_qcow2,
    "qed": _check_qed,
    "vmdk": _check_vmdk,
    "vpc": _check_vpc,
}


def _virtual_size(fd: int, driver: str) -> int:
    """Return the bytes of the disk; raise BadSource, CommandFailed."""
    info = msgspec.json.decode(_qemu_img("info", fd, driver, "--output=json"), type=_Info)
    other = info.full_backing_filename or info.backing_filename
    if other:
        raise _not_one_file(f"it needs {other!a}")
    if info.encrypted:
        raise _encrypted()
    return info.virtual_size


def _check(fd: int, driver: str) -> None:
    """Raise CommandFailed for an incomplete image: its missing clusters would read as zeroes."""
    # qemu-img(1): 3 means only leaked clusters, 63 means the format has no check.
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


def _not_one_file(why: str) -> BadSource:
    return BadSource(f"an image must be one file, but {why}", hint=_ONE_FILE_HINT)


def _encrypted() -> BadSource:
    return BadSource("it is encrypted (LUKS)", hint=OPEN_HINT)


def said(error: CommandFailed) -> str:
    """Return the last lines that a failed program printed."""
    return "\n".join(error.output.strip().splitlines()[-8:]) or error.message
