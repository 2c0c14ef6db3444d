"""Writes ext2 images with 4 KiB blocks, as DAX requires; the same tree gives the same bytes.

`mke2fs -d` numbers inodes in readdir(3) order, which most file systems do not define. Therefore
mke2fs reads a copy of the tree in a scratch ext2 file system. The copy is written in order of
names, and ext2 without hashed directories returns names in the order of their creation. Mounting
the scratch file system is safe: onecopy has just made it. Not here: EROFS (fs_image.py).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from onecopy.errors import BadSource, CommandFailed, NotPermitted
from onecopy.images.image_tools import make_file, run_maker
from onecopy.images.pax_header import BadMember
from onecopy.images.tree import Facts
from onecopy.images.tree_members import copy_tree
from onecopy.images.unpack import Unpacker
from onecopy.linux.mount import mounted
from onecopy.model import PAGE_SIZE, align_up
from onecopy.subprocesses import find_program
from onecopy.vmm.confined_tool import named

#: The latest time (seconds since 1970) that Linux can store in an ext2 inode.
_NEWEST = 0x7FFF_FFFF
#: Blocks of a block group.
_GROUP = 32768
#: Bytes of an inode.
_INODE = 256


def image_size(facts: Facts) -> int:
    """Return an upper bound of the image's size in bytes; a multiple of 2 MiB."""
    blocks = facts.blocks + _inodes(facts) * _INODE // PAGE_SIZE
    # Each block group adds bitmaps, a copy of the superblock, and rounding.
    blocks += (blocks // _GROUP + 1) * 32 + blocks // 64
    return align_up(blocks * PAGE_SIZE)


def _inodes(facts: Facts) -> int:
    return facts.inodes + facts.inodes // 32 + 64


def make_ext2(tree: Path, out: Path, facts: Facts, uuid: str) -> None:
    """Write an ext2 image of ``tree`` to ``out``.

    ext2 keeps times in whole seconds. Sockets are skipped.

    Args:
        tree: The directory to read.
        out: The file to write.
        facts: The result of `scan` on ``tree``.
        uuid: The UUID of the file system.

    Raises:
        NotPermitted: The user is not root, who alone can mount the scratch file system.
        BadSource: An attribute is larger than a block, or a time is after 2038.
        CommandFailed, MissingProgram, OSError: mke2fs or the disk failed.
    """
    if os.geteuid() != 0:
        raise NotPermitted("only root can build ext2 images", hint="use --fs erofs")
    if facts.newest > _NEWEST:
        raise BadSource(
            f"the time of {facts.newest_path!r} is {facts.newest} s since 1970; "
            f"the limit of ext2 is {_NEWEST}",
            hint="set another time with touch(1), or use --fs erofs",
        )
    for program in ("mke2fs", "debugfs"):
        find_program(program)
    size = image_size(facts)
    scratch = Path(f"{out}.scratch")
    with make_file(out, size) as image:
        with make_file(scratch, size) as work:
            scratch.unlink()
            # Reserve the blocks now. A full disk behind a loop device would cause no error.
            os.posix_fallocate(work, 0, size)
            _format(work, facts, uuid)
            with mounted(work, ("ext2", "ext4")) as root:
                os.rmdir("lost+found", dir_fd=root)
                _copy(tree, root, out.parent)
                _format(image, facts, uuid, tree=root)
                keeps = _exists("lost+found", root)
        if not keeps:
            _remove_lost_and_found(image, facts)
    _fix_inodes(out, tree.stat())


def _copy(tree: Path, root: int, scratch: Path) -> None:
    try:
        with Unpacker(Path(named(root)), scratch) as unpacker:
            copy_tree(tree, unpacker)
    except BadMember as error:
        raise BadSource(
            f"ext2 cannot hold {os.fsdecode(error.name[:4096])!r}: {error.what}",
            hint="remove it from the source, or use --fs erofs",
        ) from error


def _format(image: int, facts: Facts, uuid: str, tree: int | None = None) -> None:
    """Make an ext2 file system in an open file, with the files of the directory ``tree``."""
    features = "none,sparse_super,large_file,filetype,ext_attr"
    argv = ["mke2fs", "-q", "-F", "-t", "ext2", "-b", "4096", "-I", str(_INODE), "-m", "0"]
    argv += ["-N", str(_inodes(facts)), "-O", features, "-U", uuid, "-E", f"hash_seed={uuid}"]
    if tree is not None:
        # The name is a link in /proc. Without "/." mke2fs would read the link's attributes.
        argv += ["-d", f"{named(tree)}/."]
    run_maker(argv, facts, image, tree)


def _remove_lost_and_found(image: int, facts: Facts) -> None:
    ran = run_maker(["debugfs", "-w", "-R", "rmdir lost+found"], facts, image)
    # debugfs exits with 0 even if the command failed. Then it prints more than its version line.
    if len(ran.err.strip().splitlines()) > 1:
        raise CommandFailed("debugfs", ran.code, ran.err)


def _exists(name: str, folder: int) -> bool:
    try:
        os.lstat(name, dir_fd=folder)
    except FileNotFoundError:
        return False
    return True


def _fix_inodes(image: Path, root: os.stat_result) -> None:
    """Set ctime and atime to mtime, and set the root inode's owner and mode to the tree's.

    mke2fs takes ctime and atime from the scratch copy, and does not copy the root's owner and mode.

    Source: Linux Documentation/filesystems/ext4 (super, group_descr, inodes).
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
