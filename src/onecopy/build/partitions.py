"""What a raw disk image holds: a file system, or partitions, and what is in them.

libblkid tells, by programs of util-linux that read the file and mount nothing. Not here: other
formats than raw (diskformat.py), and which partition is the root (disk.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from onecopy.errors import BadSource, CommandFailed
from onecopy.model import format_size
from onecopy.run import run

#: What this host's kernel is asked to mount.
FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs")
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


class Partition(msgspec.Struct, frozen=True):
    """One partition, or the whole disk if it has none (number 0)."""

    number: int
    start: int
    """Bytes."""
    size: int
    """Bytes."""
    fs: str
    """As blkid(8) calls it; "" for nothing known."""

    @property
    def mountable(self) -> bool:
        """Whether it has one of `FILE_SYSTEMS`."""
        return self.fs in FILE_SYSTEMS

    def __str__(self) -> str:
        where = f"#{self.number}" if self.number else "the whole disk"
        return f"{where} ({format_size(self.size)}): {_OTHERS.get(self.fs, self.fs)}"


def read_partitions(image: Path) -> list[Partition]:
    """What the raw disk ``image`` holds, in order of number.

    Raises BadSource (nothing known, or cut off), MissingProgram, OSError.
    """
    size = image.stat().st_size
    whole = _probe(image, 0, size)
    if "TYPE" in whole:
        return [Partition(0, 0, size, whole["TYPE"])]
    if whole.get("PTTYPE") == _PROTECTIVE:
        raise BadSource("its partition table (GPT) does not fit it: it is truncated", hint=_HINT)
    if "PTTYPE" not in whole:
        raise BadSource(
            "there is neither a file system nor a partition table in it",
            hint="name a disk image, or the image of a file system",
        )
    found = [_partition(image, row, size) for row in _table(image)]
    if not found:
        raise BadSource("its partition table is empty", hint=_HINT)
    return found


def _table(image: Path) -> list[Sequence[str]]:
    argv = ["partx", "--bytes", "--raw", "--noheadings", "--output", "NR,START,SIZE"]
    try:
        return [row.split() for row in run([*argv, image]).splitlines()]
    except CommandFailed as error:
        raise BadSource("its partition table cannot be read", hint=_HINT) from error


def _partition(image: Path, row: Sequence[str], whole: int) -> Partition:
    number, start, size = int(row[0]), int(row[1]) * _SECTOR, int(row[2])
    if start + size > whole:
        raise BadSource(
            f"it is truncated: partition {number} ends at byte {start + size}, the disk at {whole}",
            hint=_HINT,
        )
    return Partition(number, start, size, _probe(image, start, size).get("TYPE", ""))


def _probe(image: Path, start: int, size: int) -> dict[str, str]:
    """What libblkid knows of a stretch of the image; empty for nothing."""
    argv = ["blkid", "--probe", "--output", "export", "--offset", str(start), "--size", str(size)]
    try:
        lines = run([*argv, image]).splitlines()
    except CommandFailed as error:
        # 2: nothing found; 8: several, which contradict each other (blkid(8)).
        if error.returncode in (2, 8):
            return {}
        raise
    return dict(line.split("=", 1) for line in lines if "=" in line)
