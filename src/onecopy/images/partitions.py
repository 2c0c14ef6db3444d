"""What a disk holds: a file system, or partitions, and what is in them.

libblkid tells, by programs of util-linux that run in the reader. Not here: asking them
(disk_reader.py), and which partition is the root (images/sources/disk.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from onecopy.errors import BadSource
from onecopy.model import format_size

#: What the reader's kernel is asked to mount.
FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs")
#: More than any disk of an operating system has.
MOST = 128
#: What else may be in the place of a file system, in a user's words.
_OTHERS = {
    "crypto_LUKS": "encrypted (LUKS)",
    "BitLocker": "encrypted (BitLocker)",
    "LVM2_member": "LVM",
    "linux_raid_member": "a part of a RAID",
    "zfs_member": "a part of a ZFS pool",
    "swap": "swap",
    "": "no file system",
}
_HINT = "the image may be truncated or damaged: compare it with where it came from"
_SECTOR = 512
# What protects a GPT from programs that know none: alone if the GPT does not hold.
_PROTECTIVE = "PMBR"
_ROW = re.compile(r"partition (\d{1,5}) (\d{1,19}) (\d{1,19})(?: (\S+))?(?: (\S+))?(?: (\S+))?")
#: Types of partitions that hold others, and nothing themselves.
_EXTENDED = ("0x5", "0xf", "0x85")
_KNOWN = re.compile(r"(ID_[A-Z_]{1,40})=(.{0,512})")
_ESCAPED = re.compile(r"\\x([0-9a-fA-F]{2})")


class Partition(msgspec.Struct, frozen=True):
    """One partition, or the whole disk if it has none (number 0)."""

    number: int
    size: int
    """Bytes."""
    fs: str
    """As blkid(8) calls it; "" for nothing known."""
    uuid: str = ""
    """The file system's."""
    label: str = ""
    part_uuid: str = ""
    """The partition's own."""
    part_label: str = ""

    @property
    def mountable(self) -> bool:
        """Whether it has one of `FILE_SYSTEMS`."""
        return self.fs in FILE_SYSTEMS

    @property
    def device(self) -> str:
        """The reader's name for it."""
        return f"vda{self.number or ''}"

    def __str__(self) -> str:
        where = f"#{self.number}" if self.number else "the whole disk"
        return f"{where} ({format_size(self.size)}): {shown(_OTHERS.get(self.fs, self.fs))}"


def parse_table(lines: Sequence[str]) -> list[Partition]:
    """The partitions that the reader found, in order of number.

    Raises BadSource (nothing known, or cut off).
    """
    size, blocks = _split(lines)
    whole, *rows = blocks
    fs = whole[1].get("ID_FS_TYPE")
    if fs is not None:
        return [_known(0, size, whole[1])]
    kind = whole[1].get("ID_PART_TABLE_TYPE")
    if kind == _PROTECTIVE:
        raise BadSource("its partition table (GPT) does not fit it: it is truncated", hint=_HINT)
    if kind is None:
        raise BadSource(
            "there is neither a file system nor a partition table in it",
            hint="name a disk image, or the image of a file system",
        )
    if not rows:
        raise BadSource("its partition table is empty, or cannot be read", hint=_HINT)
    if len(rows) > MOST:
        raise BadSource(f"it has more than {MOST} partitions", hint=_HINT)
    found = [_partition(row, known, size) for row, known in rows]
    return [each for each in found if each]


def _split(lines: Sequence[str]) -> tuple[int, list[tuple[str, dict[str, str]]]]:
    """The disk's size, and what is known of it and of each partition."""
    size, blocks = 0, [("", dict[str, str]())]
    for line in lines:
        if match := _KNOWN.fullmatch(line):
            blocks[-1][1][match[1]] = match[2]
        elif line.startswith("partition "):
            blocks.append((line, {}))
        elif re.fullmatch(r"disk \d{1,19}", line):
            size = int(line.split()[1])
    return size, blocks


def _partition(row: str, known: Mapping[str, str], whole: int) -> Partition | None:
    """The partition of one row; None if it does but hold others."""
    match = _ROW.fullmatch(row.strip())
    if not match:
        raise BadSource("its partition table cannot be read", hint=_HINT)
    number, start, size = int(match[1]), int(match[2]) * _SECTOR, int(match[3])
    if start + size > whole:
        raise BadSource(
            f"it is truncated: partition {number} ends at byte {start + size}, the disk at {whole}",
            hint=_HINT,
        )
    if match[4] in _EXTENDED:
        return None
    return _known(number, size, known, match[5] or "", unescape(match[6] or ""))


def _known(
    number: int, size: int, known: Mapping[str, str], uuid: str = "", label: str = ""
) -> Partition:
    return Partition(
        number=number,
        size=size,
        fs=known.get("ID_FS_TYPE", ""),
        uuid=unescape(known.get("ID_FS_UUID_ENC", "")),
        label=unescape(known.get("ID_FS_LABEL_ENC", "")),
        part_uuid=uuid,
        part_label=label,
    )


def unescape(text: str) -> str:
    r"""``text`` with what libblkid wrote as \xNN as it was."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), text)


def shown(text: str) -> str:
    """What an image says, fit for a terminal, and cut."""
    return "".join(char if char.isprintable() else "?" for char in text[:300])
