"""Disk image files: their format, their size, and the lock that marks them as in use.

The lock is QEMU's own image lock (block/file-posix.c: bytes from 100 on), so `qemu-img` and other
QEMUs respect it. It belongs to the open file (fcntl(2), open file description locks). It lives as
long as any copy of the descriptor, so it ends with the VMM that holds one.

Not here: how QEMU receives the image (vmm/disk_hotplug.py).
"""

from __future__ import annotations

import fcntl
import os
import struct

from onecopy.errors import InvalidInput

_FLOCK = "hhqqi4x"
_FIRST, _COUNT = 100, 200
#: Offsets within the lock range: the bytes for "does not share", and the permissions' numbers.
_UNSHARED, _WRITES, _RESIZES = 100, 1, 3

#: The header of qcow2 (QEMU docs/interop/qcow2.txt): magic, version, offset of the backing file's
#: name, ..., encryption, ..., incompatible features.
_QCOW2 = b"QFI\xfb"
_HEAD = struct.Struct(">4s I Q I I Q I I Q Q I I Q Q")
_DATA_FILE = 1 << 2
#: Bytes for the tables of even the smallest image, with a large margin.
_TABLES = 16 << 20


def lock(fd: int) -> bool:
    """Lock an image that is open for writing; return False if another process uses it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _range())
    except BlockingIOError:
        return False
    return True


def lock_for_reading(fd: int) -> bool:
    """Keep others from writing to an image that is open for reading.

    The lock lasts while the descriptor is open. QEMU has one lock byte for each permission
    (include/block/block-common.h), and one for each that it does not share with others. This locks
    the latter for writing and resizing.

    Returns:
        False if another process writes to the image.
    """
    for byte in (_FIRST + _UNSHARED + _WRITES, _FIRST + _UNSHARED + _RESIZES):
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _range(fcntl.F_RDLCK, byte, 1))
        except BlockingIOError:
            return False
    return not any(
        _is_locked(fd, _range(fcntl.F_WRLCK, _FIRST + kind, 1)) for kind in (_WRITES, _RESIZES)
    )


def is_used(fd: int) -> bool:
    """Whether an image is in use, other than by a lock through this descriptor."""
    return _is_locked(fd, _range())


def _is_locked(fd: int, lock: bytes) -> bool:
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, lock)
    return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)


def _range(kind: int = fcntl.F_WRLCK, first: int = _FIRST, count: int = _COUNT) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, first, count, 0)


def format_of(fd: int, name: str) -> str:
    """Return ``qcow2`` or ``raw``, as the image's name says.

    The name decides because a guest can write any header into a raw image, but cannot rename it.

    Raises:
        InvalidInput: the header contradicts the name.
    """
    head = os.pread(fd, _HEAD.size, 0)
    named = name.endswith(".qcow2")
    if head.startswith(_QCOW2) != named:
        header = "has no qcow2 header" if named else "has a qcow2 header"
        raise InvalidInput(
            f"{name} {header}, which contradicts its name",
            hint="name qcow2 images *.qcow2; any other name means raw. If a guest has written to "
            "the image, examine it before you rename it",
        )
    if named:
        _require_standalone(head, name)
        return "qcow2"
    return "raw"


def largest_size(fd: int, form: str) -> int:
    """Return the largest size in bytes that the image's file can reach.

    A qcow2 file grows to the size of its disk. Its tables (QEMU docs/interop/qcow2.txt) and the
    data of its snapshots come on top.
    """
    size = os.fstat(fd).st_size
    if form == "raw":
        return size
    disk = int.from_bytes(os.pread(fd, 8, 24), "big")
    return size + disk + disk // 512 + _TABLES


def _require_standalone(head: bytes, name: str) -> None:
    """Refuse a qcow2 image that needs another file or a key.

    Raises:
        InvalidInput: it has a backing file or data file, or is encrypted or truncated.
    """
    if len(head) < _HEAD.size:
        raise InvalidInput(
            f"{name} is damaged: it is shorter than a qcow2 header",
            hint="copy the image again from its source",
        )
    _, version, backing, _, _, _, encrypted, *_, features = _HEAD.unpack(head)
    # In version 2 the header ends before the features.
    if backing or encrypted or (version >= 3 and features & _DATA_FILE):
        raise InvalidInput(
            f"{name} is encrypted or needs another file",
            hint="convert it to a standalone image: qemu-img convert -O qcow2 OLD NEW",
        )


def file_system_size(fd: int) -> int | None:
    """Return the size in bytes of the ext4 file system in a raw image; None if there is none.

    Source:
        Linux Documentation/filesystems/ext4/super.rst.
    """
    head = os.pread(fd, 1024, 1024)
    if head[56:58] != b"\x53\xef":
        return None
    blocks, shift, wide, high = (
        int.from_bytes(head[at : at + 4], "little") for at in (4, 24, 0x60, 0x150)
    )
    # The high half is valid only with the feature 64bit.
    return (blocks | (high << 32 if wide & 0x80 else 0)) << (10 + shift)
