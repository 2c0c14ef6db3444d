"""Writes a directory tree as a file system image that guests map with DAX.

The same tree gives the same bytes. Owners, modes, times, links, devices, attributes and ACLs are
kept. The file system's own timestamps are the newest modification time in the tree. Not here: the
origin of the tree (source.py), the details of ext2 (ext2.py).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec.structs import replace

from onecopy.errors import BadSource, CommandFailed, Incompatible, InvalidInput
from onecopy.images.ext2 import image_size, make_ext2
from onecopy.images.free_space import disk_is_full, disk_space
from onecopy.images.image_tools import make_file, require_memory, run_maker
from onecopy.images.tree import Facts, scan
from onecopy.linux.syscall import open_without_devices
from onecopy.model import PAGE_SIZE, align_up
from onecopy.vmm.confined_tool import named

#: All images share one UUID. Builds must be reproducible, and nothing mounts a segment by UUID.
IMAGE_UUID = "6f6e6563-6f70-4079-8000-000000000001"


def make_image(
    tree: Path, out: Path, fs: str, room: int = 0, *, left_out: list[str] | None = None
) -> int:
    """Write the image of ``tree`` to the new file ``out``.

    Args:
        tree: The directory to read.
        out: The file to write.
        fs: One of `FILE_SYSTEMS`.
        room: Bytes to leave free in a writable file system.
        left_out: Receives a text for each kind of file that the image cannot hold.

    Returns:
        The size of the image in bytes; a multiple of 2 MiB.

    Raises:
        BadSource: The tree cannot be read, changed, or exceeds a limit of the file system.
        InvalidInput: ``fs`` is unknown.
        InsufficientResources, NotPermitted, MissingProgram: As their names say.
    """
    check_fs(fs)
    facts = scan(tree)
    roomy = replace(facts, blocks=facts.blocks + room // PAGE_SIZE)
    # ext2 needs a scratch copy of the same size.
    with disk_space(out.parent, image_size(roomy) * (2 if fs == "ext2" else 1)):
        try:
            FILE_SYSTEMS[fs](tree, out, roomy)
        except CommandFailed as error:
            if disk_is_full(error):
                raise
            _require_unchanged(tree, facts)
            last = "\n".join(error.output.strip().splitlines()[-8:])
            raise BadSource(f"cannot make an {fs} image of {tree}:\n{last}") from error
        size = align_up(out.stat().st_size)
        os.truncate(out, size)
    _require_unchanged(tree, facts)
    if fs == "ext2" and facts.sockets and left_out is not None:
        left_out.append(f"{facts.sockets} socket{'s' if facts.sockets > 1 else ''}")
    return size


def check_fs(fs: str) -> None:
    """Raise InvalidInput unless ``fs`` is one of `FILE_SYSTEMS`."""
    if fs not in FILE_SYSTEMS:
        raise InvalidInput(f"unknown file system {fs!r}", hint=f"use {' or '.join(FILE_SYSTEMS)}")


def _require_unchanged(tree: Path, facts: Facts) -> None:
    if scan(tree).fingerprint != facts.fingerprint:
        raise BadSource(
            f"{tree} changed while it was read", hint="stop what writes to it, then build again"
        )


def make_erofs(tree: Path, out: Path, facts: Facts) -> None:
    """Write an EROFS image without compression or inline data, which DAX cannot map.

    SOURCE_DATE_EPOCH fixes the build time. Files keep their times.

    Raises:
        BadSource: mkfs.erofs cannot store names of 255 bytes, and the tree has one.
        CommandFailed, MissingProgram, InsufficientResources: mkfs.erofs cannot run or failed.

    Source: mkfs.erofs(1).
    """
    require_memory(facts)
    with make_file(out) as image, _opened(tree) as root:
        if facts.longest_name == 255:
            _require_long_names(out.parent, facts)
        _run_mkfs(image, root, facts)


def _run_mkfs(image: int, tree: int, facts: Facts) -> None:
    """Run mkfs.erofs on an open directory, named by its path in /proc.

    As root, mkfs.erofs may read files of any owner, and could read the host's disks through device
    nodes in the tree. Then it gets the tree as a mount with nodev.
    """
    options = ["-Enoinline_data", "-U", IMAGE_UUID, "--quiet"]
    argv = ["mkfs.erofs", *options]
    if not facts.devices or os.geteuid() != 0:
        run_maker(argv, facts, image, tree, behind=[named(tree)])
        return
    try:
        safe = open_without_devices(Path(named(tree)))
    except OSError as error:
        raise Incompatible(
            f"cannot mount {named(tree)} without access to its device nodes: {error.strerror}",
            hint="use Linux 5.12 or newer with the right to mount, or use --fs ext2",
        ) from error
    try:
        run_maker(
            argv, facts, image, safe, behind=[named(safe)], over={safe: Path(named(tree)).resolve()}
        )
    finally:
        os.close(safe)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _require_long_names(scratch: Path, facts: Facts) -> None:
    """Raise BadSource if mkfs.erofs truncates names of 255 bytes, as version 1.5 does."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        (folder / "in").mkdir()
        (folder / "in" / ("n" * 255)).touch()
        try:
            with make_file(folder / "out") as image, _opened(folder / "in") as tree:
                _run_mkfs(image, tree, facts)
        except CommandFailed as error:
            raise BadSource(
                "this host's mkfs.erofs cannot store names of 255 bytes", hint="use --fs ext2"
            ) from error


FILE_SYSTEMS: dict[str, Callable[[Path, Path, Facts], None]] = {
    "erofs": make_erofs,
    "ext2": lambda tree, out, facts: make_ext2(tree, out, facts, IMAGE_UUID),
}
