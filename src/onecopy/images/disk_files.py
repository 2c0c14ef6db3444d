"""Finds the root file system on a disk, mounts what its fstab names, and copies the files.

The reader guest does the work; this module decides which requests to send. Not here: sending them
(disk_reader.py), the image as a file of this host (images/sources/disk.py).
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from onecopy.errors import BadSource
from onecopy.images.disk_format import DAMAGED, OPEN_HINT
from onecopy.images.disk_reader import Answer, Reader
from onecopy.images.free_space import disk_space
from onecopy.images.fstab import Entry, find_partition, parse_fstab
from onecopy.images.partitions import MAX_PARTITIONS, Partition, parse_table, shown
from onecopy.images.pax_header import BadMember
from onecopy.images.skipped import SkippedItems
from onecopy.images.tar_format import TarReader
from onecopy.images.unpack import unpack

_USAGE = r"(\d{1,19}) (\d{1,19}) (\d{1,19}) (\d{1,19}) (\d{1,19})"
_PROBE_REPLY = re.compile(rf"(-|\.|@|@rootfs|root) {_USAGE}")
#: Time limit of a copy in seconds: a constant, and more for each MiB and each thousand files.
_COPY_SECONDS, _SECONDS_PER_MIB, _SECONDS_PER_1000_FILES = 900.0, 1.0, 10.0
#: Lines of the reader that an error quotes.
_QUOTED_LINES = 8
_BUFFER = 1 << 20
_MEMBER_HINT = "remove the file in its machine, or copy the files and build from dir:PATH"
#: Unused btrfs subvolumes to list, at most.
_MAX_SUBVOLUMES = 64


class Usage(msgspec.Struct, frozen=True):
    """Used space of a file system, from statfs(2) in the reader."""

    size: int = 0
    """Bytes."""
    files: int = 0
    """Inodes."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.size + other.size, self.files + other.files)


class ProbedPartition(msgspec.Struct, frozen=True):
    """A partition that the reader tried to mount."""

    partition: Partition
    folder: str = "-"
    """The directory that holds a root file system; "-" if none does."""
    usage: Usage = Usage()
    error: str = ""
    """Why the partition does not mount."""

    @property
    def is_root(self) -> bool:
        """Whether the partition holds a root file system."""
        return self.folder != "-"

    def __str__(self) -> str:
        if self.error:
            return f"{self.partition}, does not mount: {self.error}"
        return f"{self.partition}{', a root' if self.is_root else ', not a root'}"


class DiskTree:
    """The file tree of the machine that a disk belongs to."""

    def __init__(self, guest: Reader, wanted: int | None) -> None:
        """Find and mount the root file system, and what its fstab mounts from the same disk.

        Args:
            guest: A booted reader.
            wanted: The number of the root's partition; None to search all partitions.

        Raises:
            BadSource: No partition or several qualify, or the reader fails.
        """
        self._guest = guest
        self._partitions = parse_table(guest.ask("table", str(MAX_PARTITIONS + 1)).lines)
        self._probed = {
            each: _probe(guest, each)
            for each in self._partitions
            if each.mountable and wanted in (None, each.number)
        }
        self._root = self._choose(wanted)
        self._usage = self._root.usage
        self._used = {self._root.partition}
        self._subvolumes = {self._root.folder}
        self._missed: list[str] = []
        self._lost = SkippedItems()
        self._found = ["/lost+found"]
        folder = self._root.folder if self._root.is_root else "."
        guest.ask("root", str(self._root.partition.number), folder)
        if self._root.is_root:
            self._mount_others()

    @property
    def name(self) -> str:
        """The partitions to copy, for progress messages."""
        others = len(self._used) - 1
        return f"{self._root.partition}" + (f" and {others} more" if others else "")

    def _choose(self, wanted: int | None) -> ProbedPartition:
        probed = list(self._probed.values())
        fit = [p for p in probed if (p.is_root if wanted is None else not p.error)]
        if len(fit) != 1:
            raise self._ambiguous(wanted, probed, len(fit))
        return fit[0]

    def _ambiguous(
        self, wanted: int | None, probed: Sequence[ProbedPartition], fit: int
    ) -> BadSource:
        """Return the error for no usable partition or several; it lists all partitions."""
        listed = "\n".join(f"  {self._probed.get(each, each)}" for each in self._partitions)
        kinds = {each.fs for each in self._partitions}
        hint = "name the partition: disk:FILE#NUMBER"
        if any(each.error for each in probed):
            hint = f"{DAMAGED}: check it with the file system's own tools"
        if fit:
            what = "several partitions hold a root file system"
        elif wanted is not None:
            what = f"partition {wanted} does not exist or holds no readable files"
        else:
            what = "no partition holds a readable root file system (/etc/os-release or an init)"
            if kinds & {"crypto_LUKS", "LVM2_member", "linux_raid_member"}:
                hint = OPEN_HINT
        return BadSource(f"{what}; partitions:\n{listed}", hint=hint)

    def _mount_others(self) -> None:
        """Mount the other file systems of this disk that the root's fstab names."""
        root = self._root
        fstab = self._guest.ask("fstab", str(root.partition.number), root.folder)
        if not fstab.ok:
            self._missed.append("all mounts of /etc/fstab, because /etc/fstab is a symbolic link")
            return
        for entry in parse_fstab(fstab.text):
            partition = find_partition(entry.device, self._partitions)
            if partition is None or not entry.target:
                if entry.target:
                    self._missed.append(f"{entry}, which is not on this disk")
            elif not partition.mountable:
                # `left_out` lists it as an unused partition.
                continue
            elif "noauto" in entry.options:
                self._missed.append(f"{entry}, which is not mounted at boot")
            elif partition != root.partition or entry.subvolume:
                self._mount(entry, partition)

    def _mount(self, entry: Entry, partition: Partition) -> None:
        words = (str(partition.number), partition.fs, entry.subvolume, entry.target)
        answer = self._guest.ask("add", *words)
        why = shown(answer.text.strip())
        if not answer.ok and why in ("a symbolic link is in the path", "no such directory"):
            self._missed.append(f"{entry}: {why} in the root")
            return
        if not answer.ok:
            raise BadSource(f"{entry} of its fstab does not mount: {why}", hint=DAMAGED)
        usage = _usage(answer.text.strip())
        # Subvolumes of one btrfs share its space.
        self._usage += Usage() if partition in self._used else usage
        self._used.add(partition)
        self._subvolumes.add(entry.subvolume.removeprefix("subvol=").strip("/"))
        self._found.append(f"{entry.target}/lost+found")

    def copy(self, into: Path) -> None:
        """Copy the files into the empty directory ``into``.

        Raises:
            BadSource: A file cannot be read or stored, or the reader fails.
            InsufficientResources: The disk of ``into`` is too small.
            OSError: The disk of ``into`` fails.
        """
        usage = self._usage
        seconds = _COPY_SECONDS + _SECONDS_PER_MIB * usage.size / (1 << 20)
        seconds += _SECONDS_PER_1000_FILES * usage.files / 1000
        with disk_space(into, usage.size):
            files = self._guest.files([f".{path}" for path in self._found], seconds)
            try:
                unpack(TarReader(io.BufferedReader(files, _BUFFER), self._lost.add), into)
            except BadMember as error:
                self._require_whole(files.answer)
                where = f"{os.fsdecode(error.name[:4096])!a}: " if error.name else ""
                raise BadSource(f"{where}{error.what}", hint=_MEMBER_HINT) from error
        self._require_whole(files.answer)
        text = files.answer.text if files.answer else ""
        sockets = len(re.findall(r": socket ignored$", text, re.MULTILINE))
        if sockets:
            self._missed.append(f"{sockets} socket{'s' if sockets > 1 else ''}")

    def _require_whole(self, answer: Answer | None) -> None:
        """Raise BadSource if tar or the reader's kernel reported an unreadable file."""
        wrong: list[str] = []
        if answer and not answer.ok:
            wrong = [line for line in answer.lines if "Total bytes" not in line][:_QUOTED_LINES]
        if answer:
            names = "|".join(sorted(each.device for each in self._used))
            wrong += self._guest.ask("wrong", names).lines[:_QUOTED_LINES]
        if wrong:
            text = "\n".join(shown(line) for line in wrong)
            raise BadSource(f"it is damaged:\n{text}", hint=DAMAGED)

    def left_out(self) -> list[str]:
        """List what was not copied, one text for each item or kind."""
        found = [str(self._probed.get(p, p)) for p in self._partitions if p not in self._used]
        found += self._missed + self._lost.lines()
        found += [f"the content of {path}" for path in self._found if self._has_files(path)]
        for each in self._used:
            if each.fs == "btrfs":
                found += [f"the subvolume {shown(name)}" for name in self._unused_subvolumes(each)]
        return found

    def _has_files(self, path: str) -> bool:
        return not self._guest.ask("empty", path).ok

    def _unused_subvolumes(self, partition: Partition) -> list[str]:
        lines = self._guest.ask("subvolumes", str(partition.number)).lines
        return [name for name in lines[:_MAX_SUBVOLUMES] if name not in self._subvolumes]


def _probe(guest: Reader, partition: Partition) -> ProbedPartition:
    answer = guest.ask("look", str(partition.number), partition.fs)
    text = answer.text.strip()
    match = _PROBE_REPLY.fullmatch(text)
    if not answer.ok or not match:
        lines = text.splitlines() or ["the reader gave no reason"]
        quoted = "\n".join(shown(line) for line in lines[-_QUOTED_LINES:])
        return ProbedPartition(partition, error=quoted)
    return ProbedPartition(partition, match[1], _usage(text.partition(" ")[2]))


def _usage(text: str) -> Usage:
    match = re.fullmatch(_USAGE, text)
    if not match:
        raise BadSource("the reader guest did not report the used space", hint=DAMAGED)
    block, blocks, free, files, free_files = map(int, match.groups())
    return Usage(block * max(0, blocks - free), max(0, files - free_files))
