"""The source ``disk:FILE[#PARTITION]``: one file system of a disk image, raw or of QEMU's formats.

It is mounted read-only by a process with mounts of its own, so that none is left however that ends,
and copied out of there with all that a tree holds. Not here: other formats than raw
(diskformat.py), which partitions there are (partitions.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from onecopy.build.archive import TAR_OPTIONS, require_kept
from onecopy.build.diskformat import DAMAGED, OPEN_HINT, as_raw, said
from onecopy.build.opening import opening
from onecopy.build.partitions import Partition, read_partitions
from onecopy.build.space import disk_is_full, disk_space
from onecopy.errors import BadSource, CommandFailed
from onecopy.run import find_program, run

# The journal stays as it is: to replay it would be to write to the image.
_MOUNT = """
exec 2>&1
set -u -o pipefail
image=$1 where=$2; shift 2
mkdir -p "$where"
show() {
    case $3 in
        ext3 | ext4) journal=,noload ;;
        xfs) journal=,norecovery,nouuid ;;
        btrfs) journal=,rescue=nologreplay ;;
        *) journal= ;;
    esac
    mount -t "$3" -o "ro,nodev,nosuid,noexec,loop,offset=$1,sizelimit=$2$journal" "$image" "$where"
}
"""
# For each "START SIZE FS": "FOLDER USED", the folder that is a root, or "-" if none is, and the
# space used; or what mount says. Distributions keep the root of a btrfs in one of these subvolumes.
_LOOK = """
root() {
    folders=.
    [ "$1" != btrfs ] || folders=". @ @rootfs root"
    for folder in $folders; do
        # A link could lead to the files of this host.
        [ ! -L "$where/$folder" ] || continue
        for sign in etc/os-release usr/lib/os-release sbin/init usr/lib/systemd/systemd; do
            path=$where/$folder/$sign
            if [ -e "$path" ] || [ -L "$path" ]; then
                echo "$folder"
                return
            fi
        done
    done
    echo -
}
while [ $# -gt 0 ]; do
    if said=$(show "$1" "$2" "$3" 2>&1); then
        echo "$(root "$3") $(stat -f -c '%S %b %f' "$where")"
        umount "$where"
    else
        said=${said%%$'\\n'*}
        echo "! ${said#mount: "$where: "}"
    fi
    shift 3
done
"""
# The copy would run on to its end if we were killed, and keep the mount: run.py has us told.
_COPY = """
set -e
show "$1" "$2" "$3"
folder=$4 into=$5; shift 5
trap 'trap - TERM; kill 0' TERM
{
    tar -C "$where/$folder" -c --sparse --format=posix --exclude=./lost+found "$@" . |
        tar -C "$into" -x -p --same-owner "$@"
} &
wait $!
"""
# Properties of files of a btrfs, which no other file system takes.
_TAR_OPTIONS = (*TAR_OPTIONS, "--xattrs-exclude=btrfs.*")


class _Seen(msgspec.Struct, frozen=True):
    """A mountable partition, looked into."""

    partition: Partition
    folder: str = "-"
    """The folder that is a root; "-" if none is."""
    used: int = 0
    """Bytes."""
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


class DiskSource(msgspec.Struct, frozen=True):
    """The files of one partition of the disk image ``path``."""

    path: Path
    partition: int | None
    """None: the one that holds a root."""
    label: str = "disk"
    left_out: list[str] = []
    """What of the disk was not unpacked."""

    def unpack(self, into: Path, progress: Callable[[str], None]) -> Path:
        """Copy the files into the empty folder ``into``, as root, and return it.

        Raises BadSource (no disk image, truncated, encrypted, LVM; no root, or several), NotEnough,
        MissingProgram, OSError.
        """
        scratch, where = into.with_name("disk"), into.with_name("mount")
        try:
            try:
                raw = as_raw(self.path, scratch, progress)
                progress(f"looking into {self.path.name}")
                partitions = read_partitions(raw)
            except BadSource as error:
                raise self._broken(error.message, error.hint) from error
            chosen = self._chosen(raw, partitions, where)
            progress(f"copying {chosen.partition}")
            self._copy(raw, where, chosen, into)
        finally:
            scratch.unlink(missing_ok=True)
        where.rmdir()
        return into

    def _chosen(self, raw: Path, partitions: Sequence[Partition], where: Path) -> _Seen:
        wanted = [each for each in partitions if self.partition in (None, each.number)]
        seen = self._look(raw, where, [each for each in wanted if each.mountable])
        if self.partition is not None:
            fit = [each for each in seen if not each.error]
        else:
            fit = [each for each in seen if each.is_root]
        if len(fit) != 1:
            raise self._none(partitions, seen, len(fit))
        return fit[0]

    def _look(self, raw: Path, where: Path, partitions: Sequence[Partition]) -> list[_Seen]:
        arguments = [text for each in partitions for text in _words(each)]
        lines = _in_own_mounts(_MOUNT + _LOOK, [str(raw), str(where), *arguments]).splitlines()
        return [_seen(each, line) for each, line in zip(partitions, lines, strict=True)]

    def _none(self, partitions: Sequence[Partition], seen: Sequence[_Seen], fit: int) -> BadSource:
        """Why there is not one partition to take: all of them are told."""
        looked = {each.partition: each for each in seen}
        listed = "\n".join(f"  {looked.get(each, each)}" for each in partitions)
        kinds = {each.fs for each in partitions}
        hint = "say which partition: disk:FILE#NUMBER"
        if any(each.error for each in seen):
            hint = f"{DAMAGED}; dmesg says what the kernel did not like"
        if fit:
            what = "several of its partitions hold a root"
        elif self.partition is not None:
            what = f"partition {self.partition} is not there, or holds no files that can be read"
        else:
            what = "it holds no root (with /etc/os-release or an init) that can be read"
            if kinds & {"crypto_LUKS", "LVM2_member", "linux_raid_member"}:
                hint = OPEN_HINT
        return self._broken(f"{what}; there is\n{listed}", hint)

    def _copy(self, raw: Path, where: Path, chosen: _Seen, into: Path) -> None:
        folder = chosen.folder if chosen.is_root else "."
        arguments = [*_words(chosen.partition), folder, str(into), *_TAR_OPTIONS]
        with disk_space(into, chosen.used):
            try:
                warned = _in_own_mounts(_MOUNT + _COPY, [str(raw), str(where), *arguments])
            except CommandFailed as error:
                if disk_is_full(error):
                    raise
                raise self._broken(said(error), DAMAGED) from error
        require_kept(warned)

    def _broken(self, what: str, hint: str) -> BadSource:
        return BadSource(f"{self.path} cannot be a source: {what}", hint=hint)


def _in_own_mounts(script: str, arguments: Sequence[str]) -> str:
    unshare = ["unshare", "--mount", "--propagation=private"]
    return run([*unshare, "bash", "-c", script, "disk", *arguments])


def _words(partition: Partition) -> list[str]:
    return [str(partition.start), str(partition.size), partition.fs]


def _seen(partition: Partition, line: str) -> _Seen:
    folder, _, rest = line.partition(" ")
    if folder == "!":
        return _Seen(partition, error=rest.strip())
    size, blocks, free = map(int, rest.split())
    return _Seen(partition, folder, size * (blocks - free))


def open_disk(text: str) -> DiskSource:
    """The disk image ``text``, FILE or FILE#PARTITION; raise BadSource or MissingProgram."""
    match = re.fullmatch(r"(.+)#([0-9]{1,4})", text)
    name, partition = (match[1], int(match[2])) if match else (text, None)
    hint = "write disk:FILE or disk:FILE#PARTITION with the path of a disk image"
    with opening("disk image", name, hint):
        path = Path(name).resolve(strict=True)
        with path.open("rb"):
            is_file = path.is_file()
    if not is_file:
        raise BadSource(f"{name!r} is not a file", hint="copy a device to a file first")
    for program in ("qemu-img", "blkid", "partx", "tar"):
        find_program(program)
    return DiskSource(path, partition)
