"""The image as ext2: 4 KiB blocks, so that DAX works, and the same bytes for the same tree.

`mke2fs -d` numbers inodes in the order in which readdir(3) names them, which on most file systems
is anything. So it reads a copy, written in order of names to a scratch ext2 without hashed folders,
which gives names back in the order they came. Not here: EROFS (image.py).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from onecopy.build.archive import TAR_OPTIONS, require_kept
from onecopy.build.tree import Facts
from onecopy.errors import NotPermitted
from onecopy.model import PAGE_SIZE, align_up
from onecopy.run import find_program, run

# The mount is seen by this one process tree, so it ends with it, however that ends.
_SCRIPT = """
exec 2>&1
set -eu -o pipefail
tree=$1 out=$2 uuid=$3 inodes=$4; shift 4
make() {
    mke2fs -q -F -t ext2 -b 4096 -I 256 -N "$inodes" -m 0 \
        -O none,sparse_super,large_file,filetype,ext_attr -U "$uuid" -E "hash_seed=$uuid" "$@"
}
make "$out.scratch"
mkdir "$out.mount"
mount -o loop "$out.scratch" "$out.mount"
rmdir "$out.mount/lost+found"
tar -C "$tree" -c --sort=name --sparse --format=posix "$@" . |
    tar -C "$out.mount" -x -p --same-owner "$@"
make -d "$out.mount" "$out"
[ -e "$out.mount/lost+found" ] || debugfs -w -R 'rmdir lost+found' "$out"
"""
_GROUP = 32768
_INODE = 256


def image_size(facts: Facts) -> int:
    """Bytes that an image of such a tree takes at most; a multiple of 2 MiB."""
    blocks = facts.blocks + _inodes(facts) * _INODE // PAGE_SIZE
    # Bitmaps, copies of the superblock and rounding, by group.
    blocks += (blocks // _GROUP + 1) * 32 + blocks // 64
    return align_up(blocks * PAGE_SIZE)


def _inodes(facts: Facts) -> int:
    return facts.inodes + facts.inodes // 32 + 64


def make_ext2(tree: Path, out: Path, facts: Facts, uuid: str) -> None:
    """Write an ext2 image of ``tree`` to ``out``; whole seconds are all that ext2 keeps of times.

    Raises NotPermitted (it mounts, so only root can), BadSource (attributes larger than a block),
    CommandFailed, MissingProgram, OSError.
    """
    if os.geteuid() != 0:
        raise NotPermitted("ext2 images can be built by root only", hint="use --fs erofs")
    for program in ("mke2fs", "debugfs", "tar"):
        find_program(program)
    size = image_size(facts)
    scratch = Path(f"{out}.scratch")
    with scratch.open("wb") as file:
        # Reserved now: behind a loop device a full disk would be noticed by nobody.
        os.posix_fallocate(file.fileno(), 0, size)
    with out.open("wb") as file:
        file.truncate(size)
    unshare = ["unshare", "--mount", "--propagation=private"]
    arguments = [str(tree), str(out), uuid, str(_inodes(facts)), *TAR_OPTIONS]
    said = run(
        [*unshare, "bash", "-c", _SCRIPT, "ext2", *arguments],
        env={"MKE2FS_CONFIG": "/dev/null", "E2FSPROGS_FAKE_TIME": str(facts.newest)},
    )
    require_kept(said)
    scratch.unlink()
    Path(f"{out}.mount").rmdir()
    _fix_inodes(out, tree.stat())


def _fix_inodes(image: Path, root: os.stat_result) -> None:
    """Set ctime and atime to mtime, and give the root inode the owner and mode of the tree's.

    mke2fs copies the former two from the scratch copy, and the latter two not at all. The layout
    is Linux's Documentation/filesystems/ext4 (super, group_descr, inodes).
    """
    with image.open("r+b") as file:
        file.seek(1024)
        head = file.read(1024)
        (inodes,) = struct.unpack_from("<I", head, 0)
        (per_group,) = struct.unpack_from("<I", head, 40)
        file.seek(PAGE_SIZE)
        groups = file.read(32 * (inodes // per_group))
        for number, (table,) in enumerate(struct.iter_unpack("<8xI20x", groups)):
            file.seek(table * PAGE_SIZE)
            data = bytearray(file.read(per_group * _INODE))
            for inode in range(0, len(data), _INODE):
                data[inode + 8 : inode + 16] = data[inode + 16 : inode + 20] * 2
            if number == 0:
                _set_owner(data, _INODE, root)
            file.seek(table * PAGE_SIZE)
            file.write(data)


def _set_owner(table: bytearray, inode: int, status: os.stat_result) -> None:
    uid, gid = status.st_uid, status.st_gid
    struct.pack_into("<2H", table, inode, status.st_mode, uid & 0xFFFF)
    struct.pack_into("<H", table, inode + 24, gid & 0xFFFF)
    struct.pack_into("<2H", table, inode + 120, uid >> 16, gid >> 16)
