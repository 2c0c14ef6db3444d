"""Disk images as files: what they are, and the lock that says that somebody uses one.

The lock is that of QEMU's own images (block/file-posix.c: bytes from 100 on), so `qemu-img` and
other people's QEMUs heed it, too. It belongs to the open file (fcntl(2), open file description
locks): it lives as long as any copy of the descriptor, and so dies with the VMM that has one.

Not here: how QEMU gets it (vmm/disk_hotplug.py).
"""

from __future__ import annotations

import fcntl
import os
import struct

from onecopy.errors import InvalidInput

_FLOCK = "hhqqi4x"
_FIRST, _COUNT = 100, 200
#: Where in there the bytes for "does not share" begin, and the permissions' numbers.
_UNSHARED, _WRITES, _RESIZES = 100, 1, 3

#: QEMU docs/interop/qcow2.txt: magic, version, backing file's offset, ..., encryption, ...,
#: incompatible features.
_QCOW2 = b"QFI\xfb"
_HEAD = struct.Struct(">4s I Q I I Q I I Q Q I I Q Q")
_DATA_FILE = 1 << 2
#: Bytes of the smallest image's tables, by far.
_TABLES = 16 << 20


def lock(fd: int) -> bool:
    """Lock an image that is open for writing; False if somebody uses it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _range())
    except BlockingIOError:
        return False
    return True


def lock_for_reading(fd: int) -> bool:
    """Have nobody write to an image that is open for reading, while it is; False if somebody does.

    QEMU's permissions (include/block/block-common.h) are a byte each, and so is what one does not
    share with others: writing and resizing.
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
    """Whether somebody uses an image that is open here, but not locked through this descriptor."""
    return _is_locked(fd, _range())


def _is_locked(fd: int, lock: bytes) -> bool:
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, lock)
    return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)


def _range(kind: int = fcntl.F_WRLCK, first: int = _FIRST, count: int = _COUNT) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, first, count, 0)


def form_of(fd: int, name: str) -> str:
    """``qcow2`` or ``raw``, as the name of an image says; raise InvalidInput if its head differs.

    A guest may write any head into a raw image, but cannot change the image's name.
    """
    head = os.pread(fd, _HEAD.size, 0)
    named = name.endswith(".qcow2")
    if head.startswith(_QCOW2) != named:
        what = "is no qcow2 image" if named else "has the head of a qcow2 image"
        raise InvalidInput(
            f"{name} {what}, and its name says otherwise",
            hint="qcow2 images are named *.qcow2, all others are taken as raw; if a guest wrote to "
            "it look what it is before you rename it",
        )
    if named:
        _require_alone(head, name)
        return "qcow2"
    return "raw"


def most(fd: int, form: str) -> int:
    """Bytes that the file of an image may come to have, at the most that its user has asked for.

    A qcow2 image grows up to its disk's size, and beside that has its tables (QEMU
    docs/interop/qcow2.txt), and what its snapshots keep.
    """
    size = os.fstat(fd).st_size
    if form == "raw":
        return size
    disk = int.from_bytes(os.pread(fd, 8, 24), "big")
    return size + disk + disk // 512 + _TABLES


def _require_alone(head: bytes, name: str) -> None:
    """Raise InvalidInput for a qcow2 image that needs other files or a key."""
    if len(head) < _HEAD.size:
        raise InvalidInput(f"{name} ends within its head", hint="it is damaged")
    _, version, backing, _, _, _, encrypted, *_, features = _HEAD.unpack(head)
    # The head of version 2 ends before the features.
    if backing or encrypted or (version >= 3 and features & _DATA_FILE):
        raise InvalidInput(
            f"{name} is encrypted, or needs another file beside it",
            hint="make one that stands alone: qemu-img convert -O qcow2 OLD NEW",
        )


def file_system_size(fd: int) -> int | None:
    """Bytes of the ext4 in a raw image (Linux Documentation/filesystems/ext4/super); else None."""
    head = os.pread(fd, 1024, 1024)
    if head[56:58] != b"\x53\xef":
        return None
    blocks, shift, wide, high = (
        int.from_bytes(head[at : at + 4], "little") for at in (4, 24, 0x60, 0x150)
    )
    # The high half counts only where the file system is of 64 bits.
    return (blocks | (high << 32 if wide & 0x80 else 0)) << (10 + shift)
