"""Disk images for tests, made by the programs that users make theirs with.

They are this test's own, so this host's kernel may mount them: behind its back, and gone with the
process. Not here: reading them.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from onecopy.images.tree import walk
from onecopy.model import MIB

#: File system -> the least size (MiB) that it takes, and what makes it.
MAKERS = {
    "ext2": (8, "mke2fs -q -t ext2 -I 256"),
    "ext3": (16, "mke2fs -q -t ext3 -I 256"),
    "ext4": (16, "mke2fs -q -t ext4 -I 256"),
    "xfs": (320, "mkfs.xfs -q"),
    "btrfs": (128, "mkfs.btrfs -q"),
}
#: Runs with mounts of its own.
OWN_MOUNTS = ("unshare", "--mount", "--propagation=private", "sh", "-ec")
#: user:5 may read; struct posix_acl_xattr_header and its entries.
_ENTRIES = ((1, 6, -1), (2, 4, 5), (4, 4, -1), (16, 4, -1), (32, 0, -1))
_ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in _ENTRIES)
#: cap_net_raw=ep; struct vfs_cap_data.
_CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)


def make_tree(tree: Path) -> Path:
    """A small root with one of each thing that a tree can hold."""
    (tree / "etc").mkdir(parents=True)
    (tree / "usr/lib").mkdir(parents=True)
    (tree / "usr/lib/os-release").write_text("ID=test\n")
    (tree / "etc/os-release").symlink_to("../usr/lib/os-release")
    (tree / "etc/shadow").write_text("x" * 9000)
    os.chown(tree / "etc/shadow", 0, 42)
    (tree / "etc/shadow").chmod(0o640)
    (tree / "hole").touch()
    os.truncate(tree / "hole", 3 << 20)
    os.setxattr(tree / "etc/shadow", "user.mine", b"1\0")
    os.setxattr(tree / "etc/shadow", "system.posix_acl_access", _ACL)
    (tree / "ping").write_bytes(b"\x7fELF")
    (tree / "ping").chmod(0o4755)
    os.setxattr(tree / "ping", "security.capability", _CAPABILITY)
    os.link(tree / "ping", tree / "usr/ping")
    os.mknod(tree / "null", 0o20666, os.makedev(1, 3))
    os.mkfifo(tree / "pipe")
    (tree / ("n" * 254)).touch()
    Path(os.fsdecode(os.fsencode(tree) + b"/odd \xff\n*")).touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "socket"))
    for path in (tree, *tree.rglob("*")):
        os.utime(path, ns=(1_600_000_000_123_456_000,) * 2, follow_symlinks=False)
    return tree


def file_system(
    tree: Path, fs: str, options: str = "", *, subvolumes: str = "", crash: str = ""
) -> Path:
    """The image of a file system with ``tree`` in it, whose folders ``subvolumes`` are such.

    With ``crash``, shell commands run in it, the power of its machine goes after them.
    """
    least, maker = MAKERS[fs]
    image = tree.with_name(f"{tree.name}.{fs}")
    with image.open("wb") as file:
        file.truncate(least * MIB)
    script = f"{maker} {options} $1 && mkdir -p $1.m && mount -o loop $1 $1.m; "
    script += f"for name in {subvolumes}; do btrfs -q subvolume create $1.m/$name; done; "
    script += "cp -a $0/. $1.m"
    if crash:
        # What the kernel has sent to the disk by now, and no more.
        script += f"; sync -f $1.m; (cd $1.m; {crash}); cp --sparse=always $1 $1.crash"
    subprocess.run([*OWN_MOUNTS, script, str(tree), str(image)], check=True, capture_output=True)
    return Path(f"{image}.crash").rename(image) if crash else image


def disk(image: Path, table: str, contents: Sequence[Path | None]) -> Path:
    """A disk with that table (sfdisk(8)), and ``contents`` as its partitions, in order of number.

    "{}" in the table stands for their sizes.
    """
    sizes = [path.stat().st_size // MIB for path in contents if path]
    with image.open("wb") as file:
        file.truncate((sum(sizes) + 16) * MIB)
    text = table.format(*(f"size={size}M" for size in sizes))
    subprocess.run(["sfdisk", "-q", image], input=text, text=True, check=True)
    argv = ["partx", "-g", "-r", "-o", "START", str(image)]
    starts = subprocess.run(argv, check=True, capture_output=True).stdout.split()
    for start, content in zip(starts, contents, strict=True):
        if content:
            copy = ["dd", f"if={content}", f"of={image}", f"seek={int(start)}", "bs=512"]
            copy += ["conv=notrunc,sparse", "status=none", "iflag=fullblock"]
            subprocess.run(copy, check=True)
    return image


def facts(tree: Path) -> dict[str, tuple[object, ...]]:
    """All of a tree that must come through: not the size of folders, and no sockets."""
    found: dict[str, tuple[object, ...]] = {}
    for path, status in walk(tree):
        if path.is_socket():
            continue
        link = path.readlink() if path.is_symlink() else None
        content = path.read_bytes() if path.is_file() and not link else None
        names = sorted(os.listxattr(path, follow_symlinks=False))
        values = [os.getxattr(path, name, follow_symlinks=False) for name in names]
        mine = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_rdev)
        links = 0 if path.is_dir() else status.st_nlink
        found[str(path.relative_to(tree))] = (*mine, links, link, content, names, values)
    found.pop("lost+found", None)
    return found


def known(image: Path, tag: str) -> str:
    """What blkid(8) knows of the image of a file system."""
    argv = ["blkid", "-p", "-o", "value", "-s", tag, str(image)]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
