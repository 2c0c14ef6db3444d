"""Which of a disk's files are the machine's, and copying them: what to ask of the reader.

Not here: asking (disk_reader.py), the disk image as a file (images/sources/disk.py).
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
from onecopy.images.partitions import MOST, Partition, parse_table, shown
from onecopy.images.pax_header import BadMember
from onecopy.images.skipped import LeftOut
from onecopy.images.tar_format import TarReader
from onecopy.images.unpack import unpack

_USAGE = r"(\d{1,19}) (\d{1,19}) (\d{1,19}) (\d{1,19}) (\d{1,19})"
_LOOKED = re.compile(rf"(-|\.|@|@rootfs|root) {_USAGE}")
#: Copying takes this many seconds, at most, and so many for each MiB and each thousand files.
_PATIENCE, _FOR_MIB, _FOR_FILES = 900.0, 1.0, 10.0
_SHOWN = 8
_BUFFER = 1 << 20
_KEPT_HINT = "remove it in its machine, or leave it out by building from dir:PATH"
#: Subvolumes that are told.
_MOST = 64


class Usage(msgspec.Struct, frozen=True):
    """What is in use of a file system, as statfs(2) says it in the reader."""

    size: int = 0
    """Bytes."""
    files: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.size + other.size, self.files + other.files)


class Seen(msgspec.Struct, frozen=True):
    """A mountable partition, looked into."""

    partition: Partition
    folder: str = "-"
    """The folder that is a root; "-" if none is."""
    usage: Usage = Usage()
    error: str = ""
    """Why it cannot be mounted."""

    @property
    def is_root(self) -> bool:
        """Whether a guest could run from it."""
        return self.folder != "-"

    def __str__(self) -> str:
        if self.error:
            return f"{self.partition}, which does not mount: {self.error}"
        return f"{self.partition}{', a root' if self.is_root else ', not a root'}"


class DiskTree:
    """The files of the machine that a disk belongs to."""

    def __init__(self, guest: Reader, wanted: int | None) -> None:
        """Find the root, in the partition ``wanted`` if it is given; raise BadSource."""
        self._guest = guest
        self._partitions = parse_table(guest.ask("table", str(MOST + 1)).lines)
        self._seen = {
            each: _look(guest, each)
            for each in self._partitions
            if each.mountable and wanted in (None, each.number)
        }
        self._root = self._choose(wanted)
        self._usage = self._root.usage
        self._used = {self._root.partition}
        self._subvolumes = {self._root.folder}
        self._missed: list[str] = []
        self._lost = LeftOut()
        self._found = ["/lost+found"]
        folder = self._root.folder if self._root.is_root else "."
        guest.ask("root", str(self._root.partition.number), folder)
        if self._root.is_root:
            self._mount_others()

    @property
    def name(self) -> str:
        """What is copied, for the user."""
        others = len(self._used) - 1
        return f"{self._root.partition}" + (f" and {others} more" if others else "")

    def _choose(self, wanted: int | None) -> Seen:
        seen = list(self._seen.values())
        fit = [s for s in seen if (s.is_root if wanted is None else not s.error)]
        if len(fit) != 1:
            raise self._none(wanted, seen, len(fit))
        return fit[0]

    def _none(self, wanted: int | None, seen: Sequence[Seen], fit: int) -> BadSource:
        """Why there is not one partition to take: all of them are told."""
        listed = "\n".join(f"  {self._seen.get(each, each)}" for each in self._partitions)
        kinds = {each.fs for each in self._partitions}
        hint = "say which partition: disk:FILE#NUMBER"
        if any(each.error for each in seen):
            hint = f"{DAMAGED}: check it with the file system's own tools"
        if fit:
            what = "several of its partitions hold a root"
        elif wanted is not None:
            what = f"partition {wanted} is not there, or holds no files that can be read"
        else:
            what = "it holds no root (with /etc/os-release or an init) that can be read"
            if kinds & {"crypto_LUKS", "LVM2_member", "linux_raid_member"}:
                hint = OPEN_HINT
        return BadSource(f"{what}; there is\n{listed}", hint=hint)

    def _mount_others(self) -> None:
        """Put what fstab mounts of this disk in its place."""
        root = self._root
        fstab = self._guest.ask("fstab", str(root.partition.number), root.folder)
        if not fstab.ok:
            self._missed.append("what /etc/fstab, which is a link, mounts")
            return
        for entry in parse_fstab(fstab.text):
            partition = find_partition(entry.device, self._partitions)
            if partition is None or not entry.target:
                if entry.target:
                    self._missed.append(f"{entry}, which is not on this disk")
            elif not partition.mountable:
                # Told as a partition that is left out.
                continue
            elif "noauto" in entry.options:
                self._missed.append(f"{entry}, which is not mounted at boot")
            elif partition != root.partition or entry.subvolume:
                self._mount(entry, partition)

    def _mount(self, entry: Entry, partition: Partition) -> None:
        words = (str(partition.number), partition.fs, entry.subvolume, entry.target)
        answer = self._guest.ask("add", *words)
        why = shown(answer.text.strip())
        if not answer.ok and why in ("a link is in the way", "there is no such folder"):
            self._missed.append(f"{entry}: {why} in the root")
            return
        if not answer.ok:
            raise BadSource(f"its fstab's {entry} does not mount: {why}", hint=DAMAGED)
        usage = _usage(answer.text.strip())
        # Subvolumes of one btrfs share its space.
        self._usage += Usage() if partition in self._used else usage
        self._used.add(partition)
        self._subvolumes.add(entry.subvolume.removeprefix("subvol=").strip("/"))
        self._found.append(f"{entry.target}/lost+found")

    def copy(self, into: Path) -> None:
        """Copy the files into an empty folder; raise BadSource, InsufficientResources, OSError."""
        usage = self._usage
        seconds = _PATIENCE + _FOR_MIB * usage.size / (1 << 20) + _FOR_FILES * usage.files / 1000
        with disk_space(into, usage.size):
            files = self._guest.files([f".{path}" for path in self._found], seconds)
            try:
                unpack(TarReader(io.BufferedReader(files, _BUFFER), self._lost.add), into)
            except BadMember as error:
                self._require_whole(files.answer)
                where = f"{os.fsdecode(error.name[:4096])!a}: " if error.name else ""
                raise BadSource(f"{where}{error.what}", hint=_KEPT_HINT) from error
        self._require_whole(files.answer)
        text = files.answer.text if files.answer else ""
        sockets = len(re.findall(r": socket ignored$", text, re.MULTILINE))
        if sockets:
            self._missed.append(f"{sockets} socket{'s' if sockets > 1 else ''}")

    def _require_whole(self, answer: Answer | None) -> None:
        """Raise BadSource if something could not be read: tar fails, or the kernel says so."""
        wrong: list[str] = []
        if answer and not answer.ok:
            wrong = [line for line in answer.lines if "Total bytes" not in line][:_SHOWN]
        if answer:
            names = "|".join(sorted(each.device for each in self._used))
            wrong += self._guest.ask("wrong", names).lines[:_SHOWN]
        if wrong:
            text = "\n".join(shown(line) for line in wrong)
            raise BadSource(f"it is damaged:\n{text}", hint=DAMAGED)

    def left_out(self) -> list[str]:
        """What of the disk was not copied, in a user's words."""
        found = [str(self._seen.get(p, p)) for p in self._partitions if p not in self._used]
        found += self._missed + self._lost.lines()
        found += [f"what lies in {path}" for path in self._found if self._holds(path)]
        for each in self._used:
            if each.fs == "btrfs":
                found += [f"the subvolume {shown(name)}" for name in self._beside(each)]
        return found

    def _holds(self, path: str) -> bool:
        return not self._guest.ask("empty", path).ok

    def _beside(self, partition: Partition) -> list[str]:
        lines = self._guest.ask("subvolumes", str(partition.number)).lines
        return [name for name in lines[:_MOST] if name not in self._subvolumes]


def _look(guest: Reader, partition: Partition) -> Seen:
    answer = guest.ask("look", str(partition.number), partition.fs)
    text = answer.text.strip()
    match = _LOOKED.fullmatch(text)
    if not answer.ok or not match:
        lines = text.splitlines() or ["it says nothing"]
        return Seen(partition, error="\n".join(shown(line) for line in lines[-_SHOWN:]))
    return Seen(partition, match[1], _usage(text.partition(" ")[2]))


def _usage(text: str) -> Usage:
    match = re.fullmatch(_USAGE, text)
    if not match:
        raise BadSource("the guest that reads it does not say what is in use", hint=DAMAGED)
    block, blocks, free, files, free_files = map(int, match.groups())
    return Usage(block * max(0, blocks - free), max(0, files - free_files))
