"""Parses what blkid and partx report of a disk: a file system, or a table of partitions.

Both programs run in the reader guest. Not here: sending requests to the reader (disk_reader.py),
choosing the root partition (disk_files.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from onecopy.errors import BadSource
from onecopy.model import format_size

#: File systems that the reader mounts.
FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs")
#: The largest number of partitions; a system's disk has fewer.
MAX_PARTITIONS = 128
#: Other types of blkid -> their names in messages.
_OTHERS = {
    "crypto_LUKS": "encrypted (LUKS)",
    "BitLocker": "encrypted (BitLocker)",
    "LVM2_member": "LVM",
    "linux_raid_member": "a member of a RAID",
    "zfs_member": "a member of a ZFS pool",
    "swap": "swap",
    "": "no file system",
}
_HINT = "the image may be truncated or damaged: compare it with the original"
_SECTOR = 512
# The protective MBR of a GPT. blkid reports it only if the GPT itself is invalid.
_PROTECTIVE = "PMBR"
_ROW = re.compile(r"partition (\d{1,5}) (\d{1,19}) (\d{1,19})(?: (\S+))?(?: (\S+))?(?: (\S+))?")
#: Types of extended partitions, which only contain other partitions.
_EXTENDED = ("0x5", "0xf", "0x85")
_KNOWN = re.compile(r"(ID_[A-Z_]{1,40})=(.{0,512})")
_ESCAPED = re.compile(r"\\x([0-9a-fA-F]{2})")


class Partition(msgspec.Struct, frozen=True):
    """A partition, or an unpartitioned disk (number 0)."""

    number: int
    size: int
    """Bytes."""
    fs: str
    """The file system's type as blkid(8) names it; "" if unknown."""
    uuid: str = ""
    """UUID of the file system."""
    label: str = ""
    """Label of the file system."""
    part_uuid: str = ""
    """UUID of the partition."""
    part_label: str = ""
    """Label of the partition."""

    @property
    def mountable(self) -> bool:
        """Whether the partition has one of `FILE_SYSTEMS`."""
        return self.fs in FILE_SYSTEMS

    @property
    def device(self) -> str:
        """The device name in the reader."""
        return f"vda{self.number or ''}"

    def __str__(self) -> str:
        where = f"#{self.number}" if self.number else "the whole disk"
        return f"{where} ({format_size(self.size)}): {shown(_OTHERS.get(self.fs, self.fs))}"


def parse_table(lines: Sequence[str]) -> list[Partition]:
    """Parse the reader's report into partitions, in order of number.

    Args:
        lines: Lines ``disk SIZE``, ``partition NUMBER START SIZE ...`` and ``ID_...=VALUE``.

    Raises:
        BadSource: The disk has no known content, or its table is damaged or too long.
    """
    size, blocks = _split(lines)
    whole, *rows = blocks
    fs = whole[1].get("ID_FS_TYPE")
    if fs is not None:
        return [_known(0, size, whole[1])]
    kind = whole[1].get("ID_PART_TABLE_TYPE")
    if kind == _PROTECTIVE:
        raise BadSource(
            "its partition table (GPT) does not match its size: it is truncated", hint=_HINT
        )
    if kind is None:
        raise BadSource(
            "it contains neither a file system nor a partition table",
            hint="name the image of a disk or of a file system",
        )
    if not rows:
        raise BadSource("its partition table is empty or unreadable", hint=_HINT)
    if len(rows) > MAX_PARTITIONS:
        raise BadSource(f"it has more than {MAX_PARTITIONS} partitions", hint=_HINT)
    found = [_partition(row, known, size) for row, known in rows]
    return [each for each in found if each]


def _split(lines: Sequence[str]) -> tuple[int, list[tuple[str, dict[str, str]]]]:
    """Split the report into the disk's size and the properties of the disk and each partition."""
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
    """Parse the partition of one row; return None for an extended partition."""
    match = _ROW.fullmatch(row.strip())
    if not match:
        raise BadSource("its partition table is malformed", hint=_HINT)
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
    r"""Decode libblkid's \xNN escapes in ``text``."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), text)


def shown(text: str) -> str:
    """Make text from an image safe to print, and cut it to 300 characters."""
    return "".join(char if char.isprintable() else "?" for char in text[:300])
