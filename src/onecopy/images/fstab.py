"""Parses a machine's /etc/fstab and finds its entries' partitions on the machine's disk.

Not here: mounting them (disk_files.py).

Source: fstab(5).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence

import msgspec

from onecopy.images.partitions import Partition, shown

#: File systems without stored files.
_VIRTUAL = {
    *("proc", "sysfs", "tmpfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "debugfs", "tracefs"),
    *("securityfs", "efivarfs", "configfs", "hugetlbfs", "mqueue", "binfmt_misc", "fusectl"),
}
_MAX_ENTRIES = 64
_ESCAPED = re.compile(r"\\([0-7]{3})")
_DISK = re.compile(r"/dev/(?:[sxvh]|xv)da(\d{1,3})?|/dev/(?:nvme0n1|mmcblk0)(?:p(\d{1,3}))?")
_BY = {
    "UUID": "uuid",
    "LABEL": "label",
    "PARTUUID": "part_uuid",
    "PARTLABEL": "part_label",
    "/dev/disk/by-uuid/": "uuid",
    "/dev/disk/by-label/": "label",
    "/dev/disk/by-partuuid/": "part_uuid",
    "/dev/disk/by-partlabel/": "part_label",
}


class Entry(msgspec.Struct, frozen=True):
    """An entry of fstab."""

    device: str
    target: str
    """Mount point, absolute and normalised; "" for swap."""
    kind: str
    options: tuple[str, ...]

    def __str__(self) -> str:
        return shown(f"{self.target or self.kind} ({self.device})")

    @property
    def subvolume(self) -> str:
        """The mount option that selects a btrfs subvolume; "" without one."""
        return next((o for o in self.options if o.startswith(("subvol=", "subvolid="))), "")


def parse_fstab(text: str) -> list[Entry]:
    """Parse the entries for stored files and swap, in the order in which to mount them.

    Malformed lines, kernel file systems, the root and bind mounts are skipped.
    """
    found = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 3 or line.lstrip().startswith("#"):
            continue
        device, target, kind = map(_unescape, fields[:3])
        options = tuple(_unescape(fields[3]).split(",")) if len(fields) > 3 else ()
        if kind in _VIRTUAL or not {"bind", "rbind"}.isdisjoint(options):
            continue
        target = posixpath.normpath(target) if target.startswith("/") else ""
        if target not in ("/", "//") and (target or kind == "swap"):
            found.append(Entry(device, target.replace("//", "/"), kind, options))
    # Parent directories must be mounted first.
    return sorted(found, key=lambda entry: entry.target.count("/"))[:_MAX_ENTRIES]


def find_partition(device: str, partitions: Sequence[Partition]) -> Partition | None:
    """Return the partition that ``device`` of an fstab entry names; None if no single one does."""
    if match := _DISK.fullmatch(device):
        number = int(match[1] or match[2] or 0)
        return next((each for each in partitions if each.number == number), None)
    for prefix, field in _BY.items():
        head = prefix if prefix.startswith("/") else f"{prefix}="
        if device.startswith(head):
            wanted = device.removeprefix(head).strip("\"'")
            same = [p for p in partitions if _same(getattr(p, field), wanted, field)]
            return same[0] if len(same) == 1 else None
    return None


def _same(one: str, other: str, field: str) -> bool:
    if not one:
        return False
    return one.lower() == other.lower() if field.endswith("uuid") else one == other


def _unescape(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)
